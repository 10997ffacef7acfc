"""What all settings have in common."""

from spsim import Plan, load_model


def test_a_copy_works_out_its_own():
    """Not what was worked out of other settings."""
    model, plan = load_model("llama-3-70b"), Plan(tp=8)
    assert (sum(model.types.values()), plan.gpus, plan.text) == (80, 8, "tp=8")
    shorter, wider = model.model_copy(update={"layers": 4}), plan.model_copy(update={"dp": 2})
    assert (sum(shorter.types.values()), len(shorter.each_type)) == (4, 4)
    assert (wider.gpus, wider.text) == (16, "tp=8,dp=2")
    assert wider == Plan(tp=8, dp=2)
