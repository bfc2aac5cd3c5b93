"""The published weights: where they are and what they are called."""

REPOSITORY = "KunpengSong/MoMA_llava_7b"
ADDRESS = f"https://huggingface.co/{REPOSITORY}"
FOLDER = "MoMA_llava_7b"
"""The folder below models/moma that the files belong into."""

MLLM_FILES = (
    "config.json",
    "tokenizer.model",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
)
MLLM_SIZE = "14.1 GB"

ADAPTER_FILE = "attn_adapters_projectors.th"
ADAPTER_SIZE = "151 MB"
ADAPTER_NAME = f"{FOLDER}/{ADAPTER_FILE}"

GET_AGAIN = f"Get it again from {ADDRESS} into models/moma/{FOLDER}."
