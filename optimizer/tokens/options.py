"""Options that all passes have which reduce tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from optimizer.errors import OptionError
from optimizer.pass_base import PassOptions
from optimizer.targets import get_target
from optimizer.tokens import schedule

#: Share of the tokens that is left behind the last layer, where nothing else is asked for.
_KEEP = 0.5


class TokenOptions(PassOptions):
    """Options that all passes have which reduce tokens."""

    r: tuple[int, ...] | None = Field(
        None,
        description="Tokens to remove per layer: one number for all layers, or a list with one per "
        "layer; default: as many as 'keep' asks for.",
    )
    slope: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="r rises over the layers from r(1-slope) to r(1+slope); -1 removes most tokens "
        "first.",
    )
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Share of the tokens left behind the last layer, in the place of r; default "
        f"{_KEEP}.",
    )
    search: bool = Field(
        default=False,
        description="Choose the numbers per layer on sample data: as cheap as what r or keep asks "
        "for, with less damage.",
    )
    drift: float | None = Field(
        None,
        gt=0,
        description="Search for the cheapest numbers that damage outputs by at most this (KL "
        "divergence of scores in nats, relative L2 of others).",
    )
    tokens: int | None = Field(
        None,
        gt=1,
        description="Where the number of tokens is open: make it this one, for all inputs.",
    )
    protect: tuple[int, ...] = Field(
        (),
        description="Positions of tokens to protect besides class, distillation and register "
        "tokens, which are found.",
    )
    dense: Literal["give-back", "refuse"] = Field(
        "give-back",
        description="Where something behind needs every token: give each the one it was merged "
        "into, or leave the model alone.",
    )
    lowering: Literal["auto", "gather", "matrix"] = Field(
        "auto",
        description="Move tokens by index (ONNX Runtime), or by a product with a matrix "
        "(TensorRT); 'auto' by target.",
    )
    proportional: bool = Field(
        default=True, description="Attention counts a token as often as it stands for."
    )
    places: bool = Field(
        default=False,
        description="Add an output that tells, for each original token, which token it is in now.",
    )

    @field_validator("r", "protect", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(filter(None, value.split(",")))
        return (value,) if isinstance(value, int) else value

    @field_validator("r")
    @classmethod
    def _not_negative(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 0):
            msg = "numbers of tokens, 0 or more, separated by commas"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenOptions:
        if self.r is not None and self.keep is not None:
            msg = "r and keep say the same thing in two ways; give one of them"
            raise ValueError(msg)
        if self.drift is not None and (self.r is not None or self.keep is not None):
            msg = "drift is a budget by itself; leave out r and keep"
            raise ValueError(msg)
        if self.slope and (self.r is None or len(self.r) > 1):
            msg = "slope needs r with one number"
            raise ValueError(msg)
        return self

    def by_index(self, target: str) -> bool:
        """Whether tokens are moved by index."""
        if self.lowering == "auto":
            return get_target(target).runtime == "onnxruntime"
        return self.lowering == "gather"

    def wanted(self, name: str, layers: int, free: int) -> list[int]:
        """Tokens to remove in each of ``layers`` layers, before anything is clipped.

        Args:
            name: Of the pass, for the message.
            layers: L.
            free: Tokens that are not protected.

        Raises:
            OptionError: ``r`` is a list of another length.
        """
        if self.r is None:
            share = _KEEP if self.keep is None else self.keep
            return schedule.keeping(share, free, layers)
        if len(self.r) == 1:
            return schedule.linear(self.r[0], self.slope, layers)
        if len(self.r) != layers:
            raise OptionError(
                f"pass '{name}': option r has {len(self.r)} numbers, but the model has {layers} "
                "layers in a row; give one number per layer, or one for all"
            )
        return list(self.r)
