//! The names that a pickle may import: a short list for each kind of file, and nothing besides.

use super::ElementType;

/// Purpose of a pickle, which decides the globals it may name and its maximum size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// An object that `torch.save` wrote: tensors, storages and containers.
    Saved,
    /// `.metadata` of `torch.distributed.checkpoint`: records of its own classes, and no tensors.
    Metadata,
}

impl Dialect {
    /// The longest pickle that is read. The 8B model's state dict has about 50 KB, its metadata some 300 bytes for each
    /// chunk, of which there is one for each weight, layer and rank, and as much again for the plans of the ranks.
    pub const fn max_bytes(self) -> usize {
        match self {
            Dialect::Saved => 8 << 20,
            Dialect::Metadata => 32 << 20,
        }
    }

    /// The most objects, and the most entries of stack and memo. A state dict has some 20 objects for each tensor,
    /// metadata some 60 for each chunk.
    pub const fn max_objects(self) -> usize {
        match self {
            Dialect::Saved => 1 << 18,
            Dialect::Metadata => 1 << 20,
        }
    }

    /// The newest protocol. `torch.save` chooses it; metadata is in Python's own, 4, and 5 since Python 3.14.
    pub const fn max_protocol(self) -> u8 {
        match self {
            Dialect::Saved => 4,
            Dialect::Metadata => 5,
        }
    }

    /// The globals allowed, for messages.
    pub const fn allowed(self) -> &'static str {
        match self {
            Dialect::Saved => "a checkpoint may name tensors, storages and containers alone",
            Dialect::Metadata => "the metadata of a distributed checkpoint may name its own records alone",
        }
    }

    /// Resolves `module.name`, if that is allowed.
    pub fn global(self, module: &str, name: &str) -> Option<Global> {
        match self {
            Dialect::Saved => saved(module, name),
            Dialect::Metadata => metadata(module, name),
        }
    }
}

/// A name that a pickle imports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and its like
    Storage(ElementType),
    /// `torch.storage.UntypedStorage`
    UntypedStorage,
    /// `torch.Size`
    Size,
    /// `torch.bfloat16` and its like, by the name there
    DType(&'static str),
    /// `_io.BytesIO`
    BytesIo,
    /// `_codecs.encode`, by which protocol 2 writes bytes
    Encode,
    /// A class whose objects are their fields.
    Record(Class),
    /// Something called to make a value that nothing is read from, of this kind: an enum, a path.
    Value(&'static str),
}

/// The classes of metadata that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// `Metadata`: the whole file.
    Metadata,
    /// `TensorStorageMetadata`: a tensor and its chunks.
    Tensor,
    /// `BytesStorageMetadata`: an object that is no tensor.
    Bytes,
    /// `TensorProperties`: a tensor's type.
    Properties,
    /// `ChunkStorageMetadata`: a rectangle of a tensor.
    Chunk,
    /// `MetadataIndex`: names a chunk.
    Index,
    /// `_StorageInfo`: where a chunk lies.
    StorageInfo,
    /// One that tells a reader nothing: what saved the checkpoint, and the plans by which it was saved.
    Other,
}

impl Class {
    /// An object of it, with its article.
    pub const fn kind(self) -> &'static str {
        match self {
            Class::Metadata => "a Metadata",
            Class::Tensor => "a TensorStorageMetadata",
            Class::Bytes => "a BytesStorageMetadata",
            Class::Properties => "a TensorProperties",
            Class::Chunk => "a ChunkStorageMetadata",
            Class::Index => "a MetadataIndex",
            Class::StorageInfo => "a _StorageInfo",
            Class::Other => "another record",
        }
    }
}

/// Resolves `torch.NAME` as a dtype.
const DTYPES: &[&str] = &[
    "bfloat16",
    "bool",
    "complex128",
    "complex32",
    "complex64",
    "float16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "int16",
    "int32",
    "int64",
    "int8",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
];

fn dtype(name: &str) -> Option<Global> {
    DTYPES.iter().find(|known| **known == name).map(|known| Global::DType(known))
}

fn saved(module: &str, name: &str) -> Option<Global> {
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch.storage" | "torch", "UntypedStorage") => Some(Global::UntypedStorage),
        ("torch", "Size") => Some(Global::Size),
        ("_io", "BytesIO") => Some(Global::BytesIo),
        ("_codecs", "encode") => Some(Global::Encode),
        ("torch", name) => dtype(name).or_else(|| ElementType::of_storage(name).map(Global::Storage)),
        _ => None,
    }
}

fn metadata(module: &str, name: &str) -> Option<Global> {
    let class = match (module, name) {
        ("torch", "Size") => return Some(Global::Size),
        ("torch", name) => return dtype(name),
        ("collections", "OrderedDict") => return Some(Global::OrderedDict),
        ("torch.serialization", "_get_layout") => return Some(Global::Value("a layout")),
        // The folder that the checkpoint was saved in.
        ("pathlib" | "pathlib._local", "PosixPath") => return Some(Global::Value("a path")),
        ("torch.distributed.checkpoint.metadata", name) => match name {
            "Metadata" => Class::Metadata,
            "TensorStorageMetadata" => Class::Tensor,
            "BytesStorageMetadata" => Class::Bytes,
            "TensorProperties" => Class::Properties,
            "ChunkStorageMetadata" => Class::Chunk,
            "MetadataIndex" => Class::Index,
            "StorageMeta" => Class::Other,
            "_MEM_FORMAT_ENCODING" => return Some(Global::Value("a memory format")),
            _ => return None,
        },
        // Where torch before 2.3 had the properties.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties") => Class::Properties,
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING") => {
            return Some(Global::Value("a memory format"));
        }
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo") => Class::StorageInfo,
        // Megatron keeps in the metadata how each rank saved, and for some versions in a class of its own.
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix") => Class::Other,
        ("torch.distributed.checkpoint.planner", name) => match name {
            "SavePlan" | "WriteItem" | "TensorWriteData" | "BytesIOWriteData" => Class::Other,
            "WriteItemType" => return Some(Global::Value("a kind of item")),
            _ => return None,
        },
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata") => Class::Metadata,
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan") => Class::Other,
        _ => return None,
    };
    Some(Global::Record(class))
}
