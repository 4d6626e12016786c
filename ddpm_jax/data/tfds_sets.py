"""Any image set of TensorFlow Datasets as a source, read without TensorFlow."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from ddpm_jax.bounded import open_image, read_json
from ddpm_jax.config import RequestError
from ddpm_jax.data.records import RecordSource, pixels

FORMAT = "array_record"


def open_tfds(data: ml_collections.ConfigDict, split: str) -> RecordSource:
    """The TFDS set `data.name` (name, name/config or name:version) in `data.data_dir`.

    The set must have been prepared as array_record; nothing is downloaded. The images are those of
    the feature `image`, or of the only image feature; the labels those of an integer feature
    `label`. Sets whose images are not all squares of one size are cropped and resized to
    `data.image_size` (see `records.pixels`). A split may be a part, such as train[:90%].

    Raises:
      RequestError: no such set or split, not prepared, files missing, no usable image feature.
    """
    import tensorflow_datasets as tfds  # Only these sets need it.

    with _quiet_absl():
        builder = _prepared_builder(data.name, os.path.expanduser(data.data_dir))
        key, shape = _image_feature(builder.info, data)
        try:
            records = builder.as_data_source(
                split,
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
                file_format=FORMAT,
            )
            parts = builder.info.splits[split].file_instructions
        except (ValueError, KeyError):
            raise RequestError(
                f"config.data.split={split}: {data.name} has the splits "
                f"{', '.join(builder.info.splits)}, and non-empty parts of them like train[:90%]"
            ) from None
    features = {key: builder.info.features[key]}
    label = dict(builder.info.features.items()).get("label")
    if label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer):
        features["label"] = label
    parser = tfds.features.FeaturesDict(features)
    undecoded = {key: tfds.decode.SkipDecoding()}

    def read(position: int) -> tuple[Any, ...]:
        example = parser.deserialize_example_np(records[position], decoders=undecoded)
        with open_image(io.BytesIO(example[key])) as image:
            image_and_label = pixels(image, *shape[1:]), example.get("label")
        return image_and_label[: len(features)]

    ends = np.cumsum([part.take for part in parts])

    def where(position: int) -> str:
        index = np.searchsorted(ends, position, side="right")
        part = parts[index]
        return f"record {part.skip + part.take - ends[index] + position} of {part.filename}"

    return RecordSource(
        data.name,
        split,
        shape,
        len(records),
        read,
        where,
        identity=[builder.info.full_name, *map(_identity, parts)],
        labelled="label" in features,
        attempts=data.read_attempts,
    )


def _prepared_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    base, _, variant = name.partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    try:
        if re.match(r"\w+:\D", name):  # A community's set: it would be asked of the internet.
            raise tfds.core.DatasetNotFoundError(name)
        _check_features(base.partition(":")[0], data_dir)
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.0)
        raise RequestError(
            f"config.data.name={name}: no such set; choose digits, folder, lsun_lmdb or a set of "
            f"TFDS, whose nearest names are {', '.join(near)}"
        ) from None
    except RequestError:
        raise
    except Exception as error:  # Each builder refuses versions and variants in its own way.
        variants = tfds.builder_cls(base).builder_configs if base in known else {}
        near = difflib.get_close_matches(variant, variants, n=3, cutoff=0.0)
        hint = f"; the nearest variants are {', '.join(f'{base}/{v}' for v in near)}" * bool(near)
        reason = textwrap.shorten(str(error), 300)
        raise RequestError(f"config.data.name={name}: {reason}{hint}") from error
    _check_prepared(name, data_dir, builder)
    return builder


def _check_features(base: str, data_dir: str) -> None:
    """Refuses a set whose description names classes that TFDS would import from elsewhere."""
    import tensorflow_datasets as tfds

    root = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / base
    for pattern in ("*/features.json", "*/*/features.json"):  # Below a version, or variant's one.
        for file in root.glob(pattern):
            try:
                classes = [*_feature_classes(read_json(file))]
            except ValueError as error:
                raise RequestError(
                    f"config.data.data_dir: {file} is damaged ({textwrap.shorten(str(error), 200)})"
                    f"; remove {file.parent} and prepare the set again"
                ) from error
            for name in classes:
                if not name.startswith("tensorflow_datasets."):
                    raise RequestError(
                        f"config.data.data_dir: {file} asks to run {name}, which is none of TFDS's "
                        "features; get the set from elsewhere"
                    )


def _feature_classes(description: Any) -> Iterator[str]:
    """The names of the classes in a features.json, in its present and in its older form."""
    if isinstance(description, dict):
        for key in ("pythonClassName", "python_class_name", "type"):
            if isinstance(name := description.get(key), str):
                yield name
        description = list(description.values())
    if isinstance(description, list):
        for part in description:
            yield from _feature_classes(part)


def _check_prepared(name: str, data_dir: str, builder: Any) -> None:
    if not builder.is_prepared():
        lsun = f"--config.data.name={name.replace('/', '_lmdb/', 1)} --config.data.data_dir=PATH"
        raise RequestError(
            f"config.data.name={name}: not prepared in {builder.data_dir}; "
            + f"read LSUN's own files with {lsun}, or " * name.startswith("lsun/")
            + f"prepare it once: {_preparation(name, data_dir)}"
        )
    formats = [file_format.value for file_format in builder.info.available_file_formats()]
    if FORMAT not in formats:
        elsewhere = builder.data_dir.removesuffix(f"/{builder.info.full_name}") + f"_{FORMAT}"
        raise RequestError(
            f"config.data.name={name}: prepared in {builder.data_dir}, but as "
            f"{' and '.join(formats)}, not as {FORMAT}, which is read without TensorFlow; prepare "
            f"it once more with --config.data.data_dir={elsewhere}: "
            + _preparation(name, elsewhere)
        )


def _preparation(name: str, data_dir: str) -> str:
    """The shell commands that prepare a set."""
    where = f"data_dir={json.dumps(data_dir, ensure_ascii=False)}, " if data_dir else ""
    code = (
        "import tensorflow_datasets as tfds; "
        f'tfds.builder("{name}", {where}file_format="{FORMAT}").download_and_prepare()'
    )
    return f"pip install tensorflow importlib_resources && python -c {shlex.quote(code)}"


def _image_feature(info: Any, data: ml_collections.ConfigDict) -> tuple[str, tuple[int, int, int]]:
    """The name of the image feature, and the shape that its images will have."""
    import tensorflow_datasets as tfds

    images = [key for key, value in info.features.items() if type(value) is tfds.features.Image]
    key = images[0] if len(images) == 1 else "image"
    if key not in images:
        raise RequestError(
            f"config.data.name={data.name}: a set needs an image feature `image` or just one image "
            f"feature, and its features are {', '.join(sorted(info.features))}"
        )
    height, width, channels = info.features[key].shape
    if info.features[key].np_dtype != np.uint8 or channels not in (1, 3):
        raise RequestError(
            f"config.data.name={data.name}: its images are {info.features[key].np_dtype.__name__} "
            f"with {channels} channels; only uint8 with 1 or 3 channels can be read"
        )
    size = height if height is not None and height == width else data.image_size
    return key, (size, size, channels)


def _identity(part: Any) -> tuple[Any, ...]:
    """What tells a file, and the records of it that are read, from any other."""
    import tensorflow_datasets as tfds

    try:
        stat = tfds.core.Path(part.filename).stat()
    except OSError as error:
        folder = os.path.dirname(part.filename)
        raise RequestError(
            f"config.data.data_dir: {part.filename} cannot be read ({error.strerror or error}); "
            f"remove {folder} and prepare the set again"
        ) from error
    return part.filename, part.skip, part.take, stat.length, stat.mtime


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps TFDS's remarks, which concern its developers, off the terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
