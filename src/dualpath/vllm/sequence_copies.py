"""What an agent's call about a sequence copies: pages into its device blocks, or one of its blocks into a page."""

from dualpath.cluster.attachment import Admit, Begin, CopyOut, Fill, Release
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.transfer.pool import MappedPages
from dualpath.vllm.copies import Copies
from dualpath.vllm.device_sequence import DeviceSequence, Stage

SequenceCall = Admit | Fill | Begin | CopyOut | Release


def carry_out(copies: Copies, sequence: DeviceSequence, call: SequenceCall, pages: MappedPages | None) -> str:
    """Copy what a call asks for. Returns an error, or an empty string once it is done."""
    try:
        if pages is None:
            return "its agent is gone"
        if isinstance(call, Fill):
            _fill(copies, sequence, call, pages)
            copies.settle()
        elif isinstance(call, CopyOut):
            _copy_out(copies, sequence, call, pages)
            copies.settle()
    except (IndexError, ValueError, RuntimeError) as error:  # a page or block that is not there, or of the device
        return str(error)
    return ""


def _fill(copies: Copies, sequence: DeviceSequence, call: Fill, pages: MappedPages) -> None:
    if sequence.stage is not Stage.LOADING:
        raise ValueError(f"sequence {call.sequence} does not load any more")
    ratio = copies.part.ratio
    for block, page, _ in call.blocks:
        device_blocks = sequence.device_blocks[block * ratio : (block + 1) * ratio]
        if not device_blocks:
            raise ValueError(f"sequence {call.sequence} has no block {block}")
        skip = max(0, sequence.local_tokens // copies.part.block_size - block * ratio)
        for layer in range(len(copies.layers)):
            copies.to_device(pages, page, layer, device_blocks, skip)


def _copy_out(copies: Copies, sequence: DeviceSequence, call: CopyOut, pages: MappedPages) -> None:
    ratio = copies.part.ratio
    device_blocks = sequence.device_blocks[call.block * ratio : (call.block + 1) * ratio]
    if len(device_blocks) < ratio or sequence.computed_tokens < (call.block + 1) * BLOCK_TOKENS:
        raise ValueError(f"block {call.block} is not on the device any more")
    for layer in range(len(copies.layers)):
        copies.to_page(pages, call.page, layer, device_blocks)
