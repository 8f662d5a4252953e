"""The messages of a client: a mask at about its entropy, or the signs of an update at 1 bit each, with one scale.

A message is an array of uint8, so that a framework for federated learning carries it as it carries parameters (Flower's
NDArrays). There is one message for each matrix, and nothing else is sent.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mft.checks import check_rule
from mft.files import rice

Bits = NDArray[np.bool_]
Floats = NDArray[np.floating]
Message = NDArray[np.uint8]
_SCALE = np.dtype("<f4")


def encode_mask(mask: ArrayLike, known: ArrayLike | None = None) -> Message:
    """Encode the bits in which a mask differs from one that the server also has, Golomb-Rice coded (files/rice.py).

    Clients of DeltaMask (arXiv 2311.17299) also send the changes of a mask, but in a lossy filter; this code is exact.

    Args:
        mask: Shape (..., K), booleans; True where a weight is kept.
        known: The same shape. The mask at the start of the round, such as the majority of the last one; None: all
            weights are kept.
    Returns:
        At most 1 bit per weight, in rows filled up to 32 bits, plus 5 bytes per 4 million bits; 0.08 bits per weight
        if 1 % differ.
    """
    bits = np.asarray(mask, bool) ^ _known(known, np.shape(mask))
    bits = bits.reshape(-1, bits.shape[-1])
    return np.frombuffer(rice.encode(rice.words_of(bits), bits.shape[1]), np.uint8)


def decode_mask(message: Message, shape: tuple[int, ...], known: ArrayLike | None = None) -> Bits:
    """Return the mask that encode_mask was given. Raises: ValueError if no mask of this shape has this message."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    differs = rice.bits_of(rice.decode(message, rows, columns), columns)
    return differs.reshape(shape) ^ _known(known, shape)


def encode_signs(update: ArrayLike) -> Message:
    """Encode scale * sign(update) in 1 bit per number and 4 bytes. scale is the mean of |update|; 0 counts as positive.

    Args: update: any shape, finite.
    """
    numbers = np.asarray(update, np.float64)
    scale = np.abs(numbers).mean()
    check_rule(bool(np.isfinite(scale)), "update", "be finite", scale)
    signs = np.packbits((numbers >= 0).reshape(-1), bitorder="little")
    return np.concatenate([np.frombuffer(_SCALE.type(scale).tobytes(), np.uint8), signs])


def decode_signs(message: Message, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return scale * sign(update). Raises: ValueError if the message's length does not fit the shape."""
    count, head = int(np.prod(shape)), _SCALE.itemsize
    rule = f"have {head + -(-count // 8)} bytes for the shape {shape}"
    check_rule(len(message) == head + -(-count // 8), "message", rule, len(message))
    scale = np.frombuffer(message[:head].tobytes(), _SCALE)[0]
    positive = np.unpackbits(message[head:], count=count, bitorder="little").view(bool)
    return np.where(positive, scale, -scale).astype(np.float32).reshape(shape)


def encode_with_feedback(update: ArrayLike, error: ArrayLike) -> tuple[Message, NDArray[np.float64]]:
    """Encode the signs of update + error, and return (message, error): the new error is for the client's next update.

    The error is what the signs leave out. Without this error feedback (arXiv 1901.09847), it would be lost.

    Args: update, error: of one shape; the first error is 0.
    """
    whole = np.asarray(update, np.float64) + np.asarray(error, np.float64)
    message = encode_signs(whole)
    return message, whole - decode_signs(message, whole.shape)


# ---------------------------------------------------------------------------------------------- private


def _known(known: ArrayLike | None, shape: tuple[int, ...]) -> Bits:
    found = np.ones(shape, bool) if known is None else np.asarray(known, bool)
    check_rule(found.shape == tuple(shape), "known", f"have the shape of mask {tuple(shape)}", found.shape)
    return found
