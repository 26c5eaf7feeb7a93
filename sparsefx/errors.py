"""Everything sparsefx raises or warns with. Messages read `"<layer>: expected <...>, got <...>; <what to do>"`."""


class SparsefxError(ValueError):
    """Base of all errors raised on bad input."""


class DensityError(SparsefxError):
    """No allotment of weights reaches the density asked for."""


class GranularityError(SparsefxError):
    """A granularity that is not one of the documented ones."""


class LayerError(SparsefxError):
    """A layer or model that cannot be treated as asked."""


class MaskError(SparsefxError):
    """A mask that does not fit its weight or the model's count."""


class SchedulerError(SparsefxError):
    """A scheduler attached or called in a way it cannot serve."""


class CheckpointError(SparsefxError, RuntimeError):
    """A state that does not fit the model; nothing has been written."""


class DistributedError(SparsefxError, RuntimeError):
    """Ranks that disagree, or of which one is gone."""


class SparsefxWarning(UserWarning):
    """Base of all warnings."""


class TraceWarning(SparsefxWarning):
    """A module does not trace; it keeps its own forward."""


class UpdateWarning(SparsefxWarning):
    """A mask update was skipped."""


class BackendWarning(SparsefxWarning):
    """A backend is missing; its layers run on another one."""
