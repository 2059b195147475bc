"""The training loader's position, put back where Lightning lost it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def restore_loader_position(trainer: Trainer) -> bool:
    """Makes the training loader anew, at the checkpoint's position, if that position was not restored.

    `configure_optimizers` that asks for `trainer.estimated_stepping_batches` makes the training loader before the
    loops are restored, and Lightning hands a loader its saved state only while making it: such a run would go on with
    the first batches of a fresh epoch, and say nothing (`FitLoop.setup_data`, Lightning 2.6).

    Args:
        trainer: a Trainer at `on_train_start`, with its loops restored and no batch taken.

    Returns:
        Whether there was a position left to restore.
    """
    loop = trainer.fit_loop
    if not getattr(loop, "_combined_loader_states_to_load", None):
        return False
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    loop._combined_loader = None
    loop.setup_data()
    return True
