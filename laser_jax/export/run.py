"""Makes a trained model one that others load: `laser export MODEL --to FORMAT OUT`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from laser_jax.command_line import program
from laser_jax.config import load_retriever_config
from laser_jax.export.card import model_card
from laser_jax.export.files import Source, write_hf, write_sentence_transformers, write_stablehlo
from laser_jax.files.claim import Claim, OutputError
from laser_jax.files.durable import checksum, folder_written_whole, json_text
from laser_jax.models.directory import model_directory
from laser_jax.settings import changes, require

_log = logging.getLogger(__name__)
_RECORD, _CARD = ".export.json", "README.md"  # the card comes last: with it the export is whole
_WRITERS = {
    "sentence-transformers": write_sentence_transformers,
    "hf": write_hf,
    "stablehlo": write_stablehlo,
}


@dataclass(frozen=True)
class ExportOptions:
    """Writes a trained model in the form of another library, with a model card. Model and output
    may also be given by their places: MODEL --to FORMAT OUT."""

    model: str
    """A directory as `laser_jax.train` exports it, or a name on the Hugging Face hub."""
    to: Literal["sentence-transformers", "hf", "stablehlo"]
    """`sentence-transformers` adds the code that thinks, in PyTorch; `hf` is what training writes;
    `stablehlo` is one program for jax alone."""
    output: str
    """The directory to write; it must not exist, or be empty."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter, merged into the model."""
    data_licence: str | None = None
    """Of the training rows, for the card: a name such as cc-by-4.0, or a sentence."""
    push: str | None = None
    """ORGANISATION/NAME on the Hugging Face hub, where the export is uploaded too. An export that
    is there already, made by the same command, is uploaded as it is."""

    def __post_init__(self) -> None:
        wanted = f"push wants ORGANISATION/NAME, got {self.push!r}"
        require(self.push is None or self.push.strip("/").count("/") == 1, wanted)


def export(options: ExportOptions) -> None:
    """Writes `options.output`, whole, and uploads it where `options.push` says so. Raises a
    FileNotFoundError or ValueError where the model is not what it should be, the output is not
    free, or there is no token for the hub (nothing is written or sent then), and an OSError."""
    hub = None if options.push is None else _hub()
    directory = model_directory(options.model).resolve()
    config = load_retriever_config(directory)
    asked = {"model": str(directory), "to": options.to, "adapter": options.adapter}
    asked["data_licence"] = licence = options.data_licence
    read = [directory, *map(Path, filter(None, [options.adapter]))]
    asked["checksum"] = checksum(f for at in read for f in sorted(at.iterdir()) if f.is_file())
    output = Path(options.output)
    card = model_card(directory, config, options.to, options.push or output.name, licence)
    with Claim(
        output, _RECORD, lambda old: changes(old, asked, source=_RECORD), alone=True
    ) as claim:
        is_whole = claim.recorded is not None and (output / _CARD).is_file()
        if is_whole and hub is None:
            raise OutputError(f"{output} holds this export; delete it, or choose another --output")
        if not is_whole:
            source = Source.read(directory, config, options.adapter)
            claim.record(json_text(asked))
            with folder_written_whole(output, last=_CARD) as folder:
                _WRITERS[options.to](source, folder)
                (folder / _CARD).write_text(card, encoding="utf-8")
        print(output)
        if hub is not None:
            _log.info("uploading %s to %s", output, options.push)
            try:
                hub.create_repo(options.push, exist_ok=True)
                hub.upload_folder(repo_id=options.push, folder_path=output, ignore_patterns=[".*"])
            except RuntimeError as error:  # of a large file, whose cause alone says what is wrong
                raise OSError(f"{error} {error.__cause__ or ''}") from error
            print(f"{hub.endpoint}/{options.push}")


def _hub() -> Any:
    """The Hugging Face hub. Raises a ConfigError where there is no token for it."""
    import huggingface_hub  # slow to import, and few exports need it

    mend = "run `hf auth login`, or set HF_TOKEN"
    wanted = f"--push wants a token of the Hugging Face hub that may write: {mend}"
    require(huggingface_hub.get_token() is not None, wanted)
    return huggingface_hub.HfApi()


main = program("export", ExportOptions, export, ("model", "output"))
