"""The same model and data as `enstack fit`, in a plain LightningCLI."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.model import VulnerabilityClassifier


class PlainCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.num_labels", "data.num_labels")


if __name__ == "__main__":
    PlainCLI(
        VulnerabilityClassifier,
        VulnerabilityDataModule,
        seed_everything_default=42,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
