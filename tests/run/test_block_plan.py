"""What a run quantizes by default, what it says of the rest, and how the rest is taken in."""

from lightning_gsq.run.block_plan import make_plan, not_quantized
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.scheme import QuantScheme
from tests.support.decoders import DECODERS


def _model(**settings: list[str]) -> ModelQuantization:
    model = ModelQuantization("tiny", scheme=QuantScheme(4, 16), **settings)  # type: ignore[arg-type]
    model.network = DECODERS["qwen3_next"]()
    return model


def _names(model: ModelQuantization) -> set[str]:
    return {f"{plan.name}.{site.name}" for plan in make_plan(model) for site in plan.weights}


def test_what_stays_is_said_with_its_reason() -> None:
    model = _model(exclude=["*.shared_expert.*"])
    lines = not_quantized(model, make_plan(model))
    said = {line.removeprefix("not quantized: ").split()[0]: line.rpartition("): ")[2] for line in lines}
    shared = "model.layers.*.mlp.shared_expert."
    assert {name: reason.split(";")[0][:30] for name, reason in said.items()} == {
        "model.layers.*.linear_attn.conv1d.weight": "no matrix product with it was ",
        "model.layers.*.linear_attn.in_proj_ba.weight": "it sets what a state space mod",
        "model.layers.*.mlp.gate.weight": "it chooses, as routers do",
        "model.layers.*.mlp.shared_expert_gate.weight": "it has a handful of rows or co",
        **{f"{shared}{part}_proj.weight": "model.include and model.exclud" for part in ("gate", "up", "down")},
    }


def test_a_router_is_taken_in_by_name() -> None:
    plain, asked = _names(_model()), _names(_model(include=["*", "*.mlp.gate"]))
    assert asked - plain == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)} and plain < asked
    assert "model.layers.1.self_attn.k_proj.weight" in plain, "as many rows as there are experts"
