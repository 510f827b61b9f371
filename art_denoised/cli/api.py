"""Options of a classifier behind HTTP, which is paid by the query."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError, Parameter
from cyclopts.validators import Number as InRange

from art_denoised.cli.help import folded
from art_denoised.cli.options import DataOptions, Duration, Number

if TYPE_CHECKING:
    from art_denoised.data import ImageData
    from art_denoised.smoothing import BlackBox


@Parameter(name="*", group=folded("Paid API", 2))
@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """A classifier behind HTTP instead of --model.

    Attributes:
        api: URL of a service that takes a PNG in base64 in a JSON object, and answers in JSON.
        answer: Place of the class in the reply: keys and positions joined by dots.
        image_field: Name of the field with the image.
        header: Header to send, such as "Authorization: Bearer {API_KEY}"; a name in braces stands
            for that variable of the environment. May be repeated.
        timeout: Time until the whole reply must have come.
        price: Price of a query.
        budget: Largest sum to pay, over all runs in --out.
        max_queries: Largest number of queries, over all runs in --out.
    """

    api: Annotated[str | None, Parameter(metavar="URL")] = None
    answer: Annotated[str, Parameter(metavar="PATH")] = "label"
    image_field: str = "image"
    header: Annotated[list[str], Parameter(metavar="NAME:VALUE")] | None = None
    timeout: Duration = 30.0
    price: Annotated[Number, Parameter(validator=InRange(gte=0))] = 0.0
    budget: Annotated[Number, Parameter(validator=InRange(gt=0))] | None = None
    max_queries: Annotated[int, Parameter(metavar="N")] | None = None

    def __post_init__(self) -> None:
        """Refuse options without the service, and a price without a limit."""
        for name in ("header", "price", "budget", "max_queries"):
            if self.api is None and getattr(self, name):
                raise CycloptsError(msg=f"--{name.replace('_', '-')} needs --api; give both")
        if self.price and self.budget is None and self.max_queries is None:
            raise CycloptsError(msg="--price needs a limit; give --budget")
        if self.budget is not None and not self.price:
            raise CycloptsError(msg="--budget needs the price of a query; give --price")

    def load(self, options: DataOptions, workers: int | None) -> tuple[BlackBox, ImageData, Any]:
        """Return the classifier, the images and the indices of those that are chosen."""
        from torch import nn

        from art_denoised.checks import InputError
        from art_denoised.data import read_classes
        from art_denoised.smoothing import BlackBox, Budget, HttpClassifier

        assert self.api is not None
        if missing := [name for name in ("httpx", "tenacity") if find_spec(name) is None]:
            raise InputError(
                f"--api needs {' and '.join(missing)}; pip install 'art-denoised[api]'"
            )
        ask = HttpClassifier(
            self.api,
            answer=self.answer,
            headers=self._headers(),
            image_field=self.image_field,
            timeout=self.timeout,
        )
        folders = options.data.startswith("imagefolder:")
        data, indices = replace(options, classes=options.classes if folders else None).load(
            nn.Identity()
        )
        lines: Sequence[str] = getattr(data, "classes", ())
        if options.classes is not None:
            lines = read_classes(options.classes)
        if not lines or not all(isinstance(line, str) for line in lines):
            raise CycloptsError(msg="--api needs the names of the classes; give --classes FILE")
        words = [[word.strip() for word in line.split(",")] for line in lines]
        box = BlackBox(
            ask,
            [name for name, *_ in words],
            {synonym: name for name, *rest in words for synonym in rest},
            workers=4 if workers is None else workers,
            budget=Budget(self.max_queries, self.budget, self.price),
        )
        return box, data, indices

    def _headers(self) -> dict[str, str]:
        found = {}
        for text in self.header or ():
            name, colon, value = text.partition(":")
            if not colon:
                raise CycloptsError(msg=f"--header is {name!r} without a value; give NAME:VALUE")
            for variable in re.findall(r"\{(\w+)\}", value):
                if variable not in os.environ:
                    raise CycloptsError(
                        msg=f"--header {name} names {variable}, which is not in the environment; "
                        "set it"
                    )
                value = value.replace(f"{{{variable}}}", os.environ[variable])
            found[name.strip()] = value.strip()
        return found
