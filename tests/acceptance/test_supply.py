"""Supply follows demand: a node holds what callers want, before anybody calls it."""

from running import EMBEDDER, FALLOW, MODEL, Apart, Running, Service, until

EMBED = {"model": EMBEDDER, "input": "a cat"}


def readiness(service: Service) -> dict[str, str]:
    return {offer["model"]: offer["readiness"] for node in service.nodes() for offer in node["offers"]}


def restart(apart: Apart, name: str) -> Running:
    """The same command on the same folder: the same node, with nothing in memory."""
    old = apart.parts[name]
    old.stop()
    command = old.process.args
    assert isinstance(command, list)
    apart.parts[name] = Running(old.data, *(str(word) for word in command[len(FALLOW) : -2]))
    return apart.parts[name]


def test_a_node_that_comes_back_loads_what_callers_want(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    apart.lend("node", "--model", MODEL, "--model", EMBEDDER, "--verbose")
    until(lambda: readiness(service).get(MODEL) == "ready", what="the first model")
    assert service.post(EMBED, "/embeddings").status_code == 200
    node = restart(apart, "node")
    until(lambda: readiness(service) == {MODEL: "ready", EMBEDDER: "ready"}, what=f"the second, though nobody calls it: {node.output}")
    assert "callers want here" in node.said()
