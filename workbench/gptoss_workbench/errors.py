"""One family of errors. Each says what was expected, what came, and what to do, in at most six lines."""

from __future__ import annotations


class WorkbenchError(Exception):
    """Base of every error the workbench raises on purpose.

    Args:
        problem: one sentence, what is wrong.
        expected: what would have been right.
        got: what came instead.
        hint: what to do about it.
        where: where it was found, e.g. a file or a tensor.

    The parts stay readable as attributes; ``str(error)`` is what a person sees.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
        where: str | None = None,
    ) -> None:
        self.problem, self.expected, self.got, self.hint, self.where = problem, expected, got, hint, where
        lines = [problem]
        for name, value in (("where", where), ("expected", expected), ("got", got), ("hint", hint)):
            if value is not None:
                lines.append(f"  {name}: {value}")
        super().__init__("\n".join(lines))


class CheckpointError(WorkbenchError):
    """A checkpoint that is damaged, incomplete or of another architecture.

    ``file`` and ``tensor`` name the place as far as it is known.
    """

    def __init__(
        self, problem: str, *, file: str | None = None, tensor: str | None = None,
        expected: object = None, got: object = None, hint: str | None = None,
    ) -> None:
        self.file, self.tensor = file, tensor
        parts = [f"file {one_line(file)}" if file else "", f"tensor {tensor}" if tensor else ""]
        where = ", ".join(part for part in parts if part)
        super().__init__(problem, expected=expected, got=got, hint=hint, where=where or None)


def one_line(text: object) -> str:
    """A text from outside as one line: what does not print is shown escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text))


class CorruptFile(CheckpointError):
    """The bytes of one file are damaged: delete it and download it again."""


class MissingShard(CheckpointError):
    """Files of the checkpoint are not there: download the rest."""


class ModifiedConfig(CheckpointError):
    """Constants that no tensor proves differ from the published ones: ``allow_modified_config=True`` if meant so."""


class NotEnoughMemory(CheckpointError):
    """The weights do not fit, known before any was read."""


class ModelNotFound(WorkbenchError):
    """A name or folder that leads to no checkpoint, or a hub that can't be reached."""


class VocabularyError(WorkbenchError):
    """The o200k vocabulary is missing or is not the one that harmony demands."""


class PromptError(WorkbenchError):
    """A prompt that is empty, of the wrong type, or holds ids outside the vocabulary."""


class SiteError(WorkbenchError):
    """A capture or an edit names a site, layer, token, head or expert that does not exist."""


class CaptureTooLarge(WorkbenchError):
    """A capture that would not fit into memory, known before anything was computed."""


class EditError(WorkbenchError):
    """An edit whose value does not fit the site it is meant for."""


class EditNeverFired(EditError):
    """An edit was given but changed nothing, because its place never came by."""


class ExperimentError(WorkbenchError):
    """An experiment was asked something its inputs cannot answer."""
