"""What a user may ask for, validated once."""

from dataclasses import dataclass

from sparsefx.errors import DensityError, GranularityError


def check_density(density: float) -> float:
    """Return `density` as a float in (0, 1].

    Raises:
        DensityError: outside (0, 1]; a percentage or a sparsity is the usual reason.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise DensityError(
            f"density: expected a fraction of existing weights in (0, 1], got {density!r}; "
            "pass 0.05 for 5% of the weights (density is not a percentage and not sparsity)"
        )
    return float(density)


@dataclass(frozen=True)
class Granularity:
    """The unit that prune and grow decide on: a block of the weight's matrix `[out channels, in channels * taps]`.

    Attributes:
        kind: `"weight"`, `"column"`, `"block"`, `"channel"` or `"channel_in"`.
        rows, columns: The block's size for `"column"` and `"block"`.
    """

    kind: str = "weight"
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, spec: "str | tuple | Granularity") -> "Granularity":
        """Read `"weight"`, `"channel"`, `("channel", "in")`, `("column", h)` or `("block", r, c)`.

        Raises:
            GranularityError: for anything else.
        """
        if isinstance(spec, Granularity):
            return spec
        match spec:
            case "weight" | ("weight",):
                return cls()
            case "channel" | ("channel",) | ("channel", "out"):
                return cls("channel")
            case ("channel", "in"):
                return cls("channel_in")
            case ("column", int(h)) if h >= 1:
                return cls("column", h, 1)
            case ("block", int(r), int(c)) if r >= 1 and c >= 1:
                return cls("block", r, c)
        raise GranularityError(
            f'granularity: expected "weight", "channel", ("channel", "in"), ("column", h) or ("block", r, c) '
            f"with positive integers, got {spec!r}; see sparsefx.sparsify"
        )
