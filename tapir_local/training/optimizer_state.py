"""Carry the optimizer's state from one round's training to the next: `train.schedule: wsd`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.training.job import TrainJob

STATE_FILE = "optimizer.pt"  # beside the adapter: AdamW's two moments, about twice the adapter's size


def carries_state(job: TrainJob) -> bool:
    """Whether a training keeps its optimizer's state for the next round. `full` does not: it would be 8 bytes for every
    weight of the model in each round's folder."""
    return job.settings.schedule == "wsd" and job.settings.method != "full"


def carry_state(job: TrainJob, resumed: bool, out: Path, say: Callable[[str], None]) -> Any:
    """A Trainer callback that loads the last round's state when a training begins, and saves its own in `out` at its
    end. A `resumed` training has the state of its checkpoint."""
    from transformers import TrainerCallback

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        saved = job.adapter_from / STATE_FILE if job.adapter_from else None
        if saved and not resumed:
            if saved.exists():
                load_state(optimizer, saved)
            else:
                say(f"{saved} is not there: Adam's moments start at zero, as in a round of another schedule.")

    def on_train_end(self: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        import torch

        if args.process_index == 0:
            torch.save(optimizer.state_dict()["state"], out / STATE_FILE)

    hooks = (on_train_begin, on_train_end)
    return type("Carrier", (TrainerCallback,), {hook.__name__: hook for hook in hooks})()


def load_state(optimizer: Any, saved: Path) -> None:
    """Load the moments of an earlier training into an optimizer, which keeps its own learning rate and weight decay.

    Raises TapirError if the file cannot be read or belongs to other weights.
    """
    import torch

    fix = "Create the round again from its training: `tapir-local redo RUN --from train`."
    try:
        state = torch.load(saved, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler, zip reader or file system raises
        raise TapirError("the optimizer's state cannot be read", where=str(saved), fix=fix) from error
    groups = optimizer.state_dict()["param_groups"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    shapes = {number: tuple(moments["exp_avg"].shape) for number, moments in state.items() if "exp_avg" in moments}
    if set(state) != set(range(len(weights))) or any(tuple(weights[n].shape) != shape for n, shape in shapes.items()):
        raise TapirError("the optimizer's state belongs to other weights", where=str(saved), fix=fix)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
