"""One safetensors file, wherever it stands: its tensors, its metadata, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from enstack_lightning.checkpoint.deep import DeepRead, read_deeply
from enstack_lightning.checkpoint.facts import Defect, FileFacts, TensorFacts, ValueFacts
from enstack_lightning.checkpoint.location import Location
from enstack_lightning.checkpoint.readers.torch_archive import defect_of
from enstack_lightning.checkpoint.safetensors_file import read_safetensors_header, spans
from enstack_lightning.checkpoint.source import ContainerDefectError


@dataclass
class SafetensorsFile:
    """What a file says.

    Attributes:
        file: None where it cannot be opened.
        data_bytes: the size of its tensors together.
        values: what a deep look at them found.
    """

    file: FileFacts | None = None
    tensors: tuple[TensorFacts, ...] = ()
    data_bytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)
    values: tuple[ValueFacts, ...] = ()


def read_safetensors(location: Location, name: str, deep: DeepRead | None) -> SafetensorsFile:
    """Reads the header, and with `deep` every byte; what cannot be read or believed becomes a defect.

    Args:
        name: what findings call the file.
    """
    read = SafetensorsFile()
    try:
        with location.open() as source:
            read.file = FileFacts(name, source.size, without_checksum=source.size)
            header = read_safetensors_header(source)
            read.tensors = tuple(TensorFacts(t.name, t.dtype, t.shape, name) for t in header.tensors)
            read.data_bytes, read.metadata = sum(t.size for t in header.tensors), header.metadata
            if deep is not None:
                result = read_deeply(source, spans(header, name), deep)
                read.defects += result.defects
                read.values = result.values
            if source.has_changed():
                read.defects.append(Defect.changed(name))
    except ContainerDefectError as e:
        read.defects.append(defect_of(e, name))
    except OSError as e:
        read.defects.append(Defect.unreadable(name, e))
    return read
