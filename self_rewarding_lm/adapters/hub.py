"""Folders of weights to the Hugging Face hub, with huggingface_hub, which transformers brings."""

from pathlib import Path

from self_rewarding_lm.errors import AdapterError


def upload_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder as a model; its address. The repository is made where it is not there yet.

    Logging in is huggingface_hub's business. Raises AdapterError where it is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise AdapterError(
            "uploading needs huggingface_hub: pip install 'self-rewarding-lm[hf]'."
        ) from error
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)))
