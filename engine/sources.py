"""The folders that a run reads; those that a checkpoint was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import find_checkpoint, read_state
from engine.corpus import corpus_of
from engine.files import UsageError, file_hash
from engine.settings import SIZES, Config, old_spelling
from engine.weights import find_weights, folder_hash


@dataclass
class Sources:
    """Corpus, models and, with --init, a checkpoint."""
    corpus: Path
    t5: Path
    vit: Path
    init: Path | None = None  # checkpoint of a full run to begin with

    def fingerprints(self) -> dict[str, str | None]:
        """sha256 of what a checkpoint needs besides itself: it holds only what was trained."""
        return {"t5_sha256": folder_hash(self.t5), "vit_sha256": folder_hash(self.vit),
                "init_sha256": self.init and file_hash(self.init / "model.safetensors"),
                "t5_tokenizer_sha256": file_hash(self.t5 / "spiece.model")}


def stored_config(checkpoint: Path, **changes: object) -> Config:
    """The settings of a checkpoint; an exported adapter brings its datasets' labels along."""
    config = Config(**{**read_state(checkpoint)["config"], **changes})
    config.impl = old_spelling(config.impl)
    if config.data is None and (checkpoint / "corpus").is_dir():
        config.data = str(checkpoint / "corpus")
    return config


def stored_sources(checkpoint: Path, config: Config, given: Mapping[str, object]) -> Sources:
    """The folders that a checkpoint was trained on: those given now ("t5", "vit", "init"), else
    where they lay then, else by hash in weights/ (tiny) or by name from the hub (other sizes).
    UsageError unless each has the very content it had then."""
    state, folders = read_state(checkpoint), {}
    for model in ("t5", "vit", "init"):
        digest, then = state.get(f"{model}_sha256"), state.get(model)
        if digest is None:  # a run without --init
            continue
        folder = given.get(model) or (then if then and Path(then).is_dir() else None)
        name = getattr(SIZES[config.size], model, None)
        if not folder and not name:
            folder = next((made for made in sorted(Path("weights").glob(f"*/{model}"))
                           if folder_hash(made) == digest), None)
            if not folder:
                raise UsageError(f"{checkpoint}: expected the folder of its {model} (sha256 "
                                 f"{digest[:12]}), got {then or 'none'}; name it by --{model} DIR")
        folders[model] = (find_checkpoint(Path(folder)) if model == "init"
                          else find_weights(model, folder, name))
    sources = Sources(corpus_of(config), **folders)
    for name, digest in sources.fingerprints().items():
        if state.get(name, digest) != digest:
            model, _, what = name.removesuffix("_sha256").partition("_")
            raise UsageError(f"{getattr(sources, model)}: expected the {what or 'weights'} that "
                             f"{checkpoint} was trained on (sha256 {state[name][:12]}), got others "
                             f"({digest[:12]}); restore that folder, or name it with --{model} DIR")
    return sources
