"""Pytrees on disk: Orbax checkpoints of whole trees, and the step checkpoints of a training.

A tree is stored as a flat mapping from leaf paths such as `params.layers.q_proj.a` to arrays, so that a
checkpoint can be read without the classes of this package.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llmeraser_jax import files
from llmeraser_jax.parallel import bytes_from_primary, from_primary, on_primary, put, to_host
from llmeraser_jax.types import PyTree


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path. The path of a lone array is `value`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".").lstrip(".") or "value"
        if name in named:
            msg = f"Two leaves of the tree have the path {name}; a checkpoint needs distinct ones."
            raise ValueError(msg)
        named[name] = jnp.asarray(leaf)
    return named


def _unflatten(named: dict[str, Any], like: PyTree) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _flatten(like)])


def _check(stored: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint whose leaves are not those of `expected`, naming each difference."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in expected]
    for name, leaf in expected.items():
        if name in stored:
            got = (tuple(stored[name].shape), jnp.dtype(stored[name].dtype))
            if got != (leaf.shape, leaf.dtype):
                problems.append(f"{name} is {got[1]}{list(got[0])}, expected {leaf.dtype}{list(leaf.shape)}")
    if problems:
        msg = f"The checkpoint {path} does not hold the tree asked for: {'; '.join(problems[:20])}."
        raise ValueError(msg)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of the primary process, which alone reads and writes checkpoints."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def _abstract(named: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    own = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=own) for k, v in named.items()}


def _placed(read: Callable[[], dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    """Arrays that `read` reads in the primary process, on the devices of those of `like`."""
    found: dict[str, Any] = {}
    on_primary(lambda: found.update(read()))

    def placed(name, leaf):
        content = bytes_from_primary(lambda: np.asarray(found[name]).tobytes())
        return put(np.frombuffer(content, leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return {name: placed(name, leaf) for name, leaf in like.items()}


def save_pytree(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes the arrays of a tree to the new directory `path`, whole or not at all.

    The calling process writes; of several, call it in one (`parallel.on_primary`).

    Args:
        path: must not exist, or be an empty directory.
        tree: a pytree of arrays, whole in this process.

    Raises:
        FileExistsError: `path` already holds something.
    """
    path = Path(path).absolute()
    named = {name: np.asarray(leaf) for name, leaf in _flatten(tree).items()}
    with (
        files.atomic_directory(path) as temporary,
        ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer,
    ):
        checkpointer.save(temporary, named, force=True)
        checkpointer.wait_until_finished()


def restore_pytree(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Reads a tree that `save_pytree` wrote.

    Args:
        path: the checkpoint's directory.
        like: a tree of the structure, shapes, dtypes and shardings to restore.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: the checkpoint holds another tree; every difference is named.
    """
    path, expected = Path(path).absolute(), _flatten(like)

    def read() -> dict[str, Any]:
        if not path.is_dir():
            msg = f"There is no checkpoint directory {path}."
            raise FileNotFoundError(msg)
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            stored = checkpointer.metadata(path).item_metadata
            if stored is None:
                msg = f"{path} holds no checkpoint of a tree."
                raise FileNotFoundError(msg)
            _check(dict(stored.items()), expected, path)
            return checkpointer.restore(path, _abstract(expected))

    return _unflatten(_placed(read, expected), like)


class StepCheckpoints:
    """The latest checkpoints of a training, numbered by step.

    A checkpoint gets its name when it is complete, so a process killed while saving resumes from the one before.
    Saving is synchronous. Of several processes each has to make every call; the primary one reads and writes.
    """

    _manager: Any

    def __init__(self, directory: str | os.PathLike[str], *, keep_up_to: int = 0, read_only: bool = False):
        """Opens or creates the directory; leftovers of a killed save are removed.

        Args:
            directory: where the checkpoints are.
            keep_up_to: checkpoints of steps up to this one are kept, besides the latest two.
            read_only: the directory must be there, and opening it changes nothing.
        """
        self.directory, self.keep_up_to = Path(directory).absolute(), keep_up_to

        def open_manager() -> None:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False,
                cleanup_tmp_directories=not read_only,
                create=False,
                multiprocessing_options=_alone(),
            )
            state = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
            handlers = {"state": state, "info": ocp.JsonCheckpointHandler(multiprocessing_options=_alone())}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

        on_primary(open_manager)

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return from_primary(lambda: self._manager.latest_step())

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return from_primary(lambda: sorted(self._manager.all_steps()))

    def info(self, step: int) -> dict[str, Any]:
        """The info of a checkpoint alone."""
        arguments = ocp.args.Composite(info=ocp.args.JsonRestore())
        return from_primary(lambda: dict(self._manager.restore(step, args=arguments)["info"]))

    def save(self, step: int, tree: PyTree, info: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes those before the latest two that are not to be kept.

        Args:
            step: its number, above every earlier one.
            tree: a pytree of arrays.
            info: JSON-like values kept beside it.
        """
        whole = to_host(_flatten(tree))

        def write() -> None:
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(whole),  # pyright: ignore[reportCallIssue]
                info=ocp.args.JsonSave(info),  # pyright: ignore[reportCallIssue]
            )
            if not self._manager.save(step, args=arguments):
                msg = f"Orbax did not write the checkpoint of step {step} in {self.directory}."
                raise RuntimeError(msg)
            for old in self.steps()[:-2]:
                if old > self.keep_up_to:
                    self._manager.delete(old)

        on_primary(write)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The tree and the info of a checkpoint.

        Args:
            step: its number.
            like: a tree of the structure, shapes, dtypes and shardings to restore.

        Raises:
            ValueError: the checkpoint holds another tree; every difference is named.
        """
        expected = _flatten(like)

        def read() -> dict[str, Any]:
            stored = self._manager.item_metadata(step).state
            _check(dict(stored.items()), expected, self.directory / str(step))
            state = ocp.args.StandardRestore(_abstract(expected))  # pyright: ignore[reportCallIssue]
            return dict(self._manager.restore(step, args=ocp.args.Composite(state=state))["state"])

        return _unflatten(_placed(read, expected), like), self.info(step)

    def close(self) -> None:
        """Releases the directory."""
        on_primary(lambda: self._manager.close())

    def __enter__(self) -> StepCheckpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
