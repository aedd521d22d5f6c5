"""`/v1/prices` of the real service, as the OpenAI client and the command see it."""

from pathlib import Path
from typing import Any

import msgspec
import openai
from running import MODEL, Service, fallow, until

from fallow.apps.lend_settings import Power
from fallow.apps.node.pricing import Pricing
from fallow.apps.settings import Settings
from fallow.core.power import MICRO_PER_USD


def test_the_real_client_is_told_what_a_model_goes_for(service: Service, client: openai.OpenAI, tmp_path: Path) -> None:
    def found() -> list[dict[str, Any]]:
        listed: Any = client.get("/prices", cast_to=object)
        assert listed["unit"] == "credits per million tokens"
        return [one for one in listed["data"] if one["model"] == MODEL]

    [price] = until(found, what=f"a price of {MODEL}")
    floor = Pricing(Settings(data=tmp_path), {}).price(MODEL, Power().usd_per_kwh)  # the service's node runs here, and isn't measured
    assert price["hardware"] == "cpu"
    assert price["output"] * MICRO_PER_USD >= floor.output_micro_per_munit > 0
    assert price["prompt"] * MICRO_PER_USD >= floor.prompt_micro_per_munit > 0
    assert 0 <= price["utilisation"] <= 1
    past: Any = client.get(f"/prices/{MODEL}", cast_to=object)
    assert past["history"], "the hub remembers where it began"

    told = fallow("prices", MODEL, "--data", str(service.parts["up"].data))
    assert (told.returncode, told.stderr) == (0, "")
    assert f"{MODEL} (cpu): output" in told.stdout
    document = msgspec.json.decode(fallow("prices", "--json", "--data", str(service.parts["up"].data)).stdout)
    assert MODEL in {one["model"] for one in document["data"]}
