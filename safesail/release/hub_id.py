"""The Hub's ids of repositories: `org/name`."""

__all__ = ["hub_id"]


def hub_id(name: str) -> str | None:
    """The name, if it is of the form that the Hub's ids have: `org/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name else None
