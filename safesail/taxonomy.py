"""The taxonomy of safety matters: domains, their categories, and the concepts under them.

Reads `hub/taxonomy.toml`. Four domains and seventeen categories are shipped; another file may have others.
"""

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from safesail.assets import asset
from safesail.errors import InputError

__all__ = ["Category", "Domain", "Taxonomy"]

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^\S(.*\S)?$")]
Word = Annotated[str, StringConstraints(pattern=r"^[^\sA-Z]+( [^\sA-Z]+)*$")]


class _Entry(BaseModel):
    """A frozen table of the file; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Category(_Entry):
    """A subject inside a domain, as `terrorism` in `terror`; `description` is its anchor for a sentence embedding."""

    id: Slug
    name: Text
    description: Text
    concepts: tuple[Text, ...]


class Domain(_Entry):
    """A safety domain; `words` mark a text as being about it and serve only to stratify text corpora."""

    id: Slug
    name: Text
    description: Text
    words: tuple[Word, ...]
    categories: tuple[Category, ...]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        _refuse_duplicates([category.id for category in self.categories], "category id")
        _refuse_duplicates(list(self.words), "word")
        if not self.words:
            raise ValueError(f"domain {self.id!r} has no words")
        return self


class Taxonomy(_Entry):
    """The domains in the order of the file, and `neutral`: anchors of what is not a safety matter."""

    version: Literal[1]
    neutral: tuple[Text, ...]
    domains: tuple[Domain, ...]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        _refuse_duplicates([domain.id for domain in self.domains], "domain id")
        return self

    @classmethod
    def load(cls, path: Path | str | None = None) -> "Taxonomy":
        """The taxonomy in the TOML file `path`, or the shipped one; raises InputError when the file is malformed."""
        path = asset("hub/taxonomy.toml") if path is None else Path(path)
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"cannot read the taxonomy {path} ({error.strerror}); give an existing file") from None
        except ValidationError as error:
            raise InputError(f"the taxonomy {path} is malformed: {_first_problem(error)}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the taxonomy {path} is not valid UTF-8 TOML: {error}; mend that line") from None

    @property
    def domain_ids(self) -> tuple[str, ...]:
        """The ids of the domains, in the order of the file."""
        return tuple(domain.id for domain in self.domains)

    def domain(self, domain_id: str) -> Domain:
        """The domain with this id; raises InputError with the valid ids when there is none."""
        return _by_id(self.domains, domain_id, "domain")

    def category(self, domain_id: str, category_id: str) -> Category:
        """The category with this id in that domain; raises InputError with the valid ids when there is none."""
        return _by_id(self.domain(domain_id).categories, category_id, f"category of {domain_id}")

    def about(self, domain_id: str) -> re.Pattern[str]:
        """A pattern that finds any of the domain's words as a whole word, in either case."""
        longest_first = sorted(self.domain(domain_id).words, key=len, reverse=True)
        either = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in longest_first)
        return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


Entry = TypeVar("Entry", Category, Domain)


def _by_id(entries: tuple[Entry, ...], entry_id: str, kind: str) -> Entry:
    for entry in entries:
        if entry.id == entry_id:
            return entry
    valid = ", ".join(entry.id for entry in entries)
    raise InputError(f"no {kind} {entry_id!r} in the taxonomy; use one of: {valid}")


def _refuse_duplicates(values: list[str], kind: str) -> None:
    repeated = [value for value, n in Counter(values).items() if n > 1]
    if repeated:
        raise ValueError(f"{kind} {repeated[0]!r} is given twice; keep one")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "the file"
    return f"{field}: {first['msg']} (given: {first['input']!r:.80})"
