//! The globals that a pickle may import: a short list for each kind of file.

use super::ElementType;

/// Purpose of a pickle, which determines the globals it may import and its limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// An object that `torch.save` wrote: tensors, storages and containers.
    Saved,
    /// `.metadata` of `torch.distributed.checkpoint`: records of its own classes, and no tensors.
    Metadata,
}

impl Dialect {
    /// Size limit in bytes. The 8B model's state dict has about 50 KB; its metadata has some 300 bytes per chunk (one
    /// per weight, layer and rank), and as much again for the ranks' save plans.
    pub const fn max_bytes(self) -> usize {
        match self {
            Dialect::Saved => 8 << 20,
            Dialect::Metadata => 32 << 20,
        }
    }

    /// Maximum number of objects, and of entries of stack and memo. A state dict has some 20 objects per tensor,
    /// metadata some 60 per chunk.
    pub const fn max_objects(self) -> usize {
        match self {
            Dialect::Saved => 1 << 18,
            Dialect::Metadata => 1 << 20,
        }
    }

    /// The newest supported protocol. `torch.save` takes it as an argument; metadata has Python's default, 4, or 5
    /// since Python 3.14.
    pub const fn max_protocol(self) -> u8 {
        match self {
            Dialect::Saved => 4,
            Dialect::Metadata => 5,
        }
    }

    /// The globals allowed, for messages.
    pub const fn allowed(self) -> &'static str {
        match self {
            Dialect::Saved => "a checkpoint may only import tensors, storages and containers",
            Dialect::Metadata => "the metadata of a distributed checkpoint may only import its own record types",
        }
    }

    /// Resolves `module.name`, if it is allowed.
    pub fn global(self, module: &str, name: &str) -> Option<Global> {
        match self {
            Dialect::Saved => saved(module, name),
            Dialect::Metadata => metadata(module, name),
        }
    }
}

/// A global that a pickle imports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and other storage classes
    Storage(ElementType),
    /// `torch.storage.UntypedStorage`
    UntypedStorage,
    /// `torch.Size`
    Size,
    /// `torch.bfloat16` and other dtypes, by name
    DType(&'static str),
    /// `_io.BytesIO`
    BytesIo,
    /// `_codecs.encode`, by which protocol 2 writes bytes
    Encode,
    /// A record class.
    Record(Class),
    /// A callable whose result is not needed, described by its kind: an enum, a path.
    Value(&'static str),
}

/// Record classes of metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// `Metadata`: the whole file.
    Metadata,
    /// `TensorStorageMetadata`: a tensor and its chunks.
    Tensor,
    /// `BytesStorageMetadata`: an object that is not a tensor.
    Bytes,
    /// `TensorProperties`: a tensor's type.
    Properties,
    /// `ChunkStorageMetadata`: a rectangle of a tensor.
    Chunk,
    /// `MetadataIndex`: identifies a chunk.
    Index,
    /// `_StorageInfo`: location of a chunk.
    StorageInfo,
    /// Not needed for reading: the writer of the checkpoint, and its save plans.
    Other,
}

impl Class {
    /// Its name, with an article.
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

/// Names of torch's dtypes.
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
        // TensorProperties' module before torch 2.3.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties") => Class::Properties,
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING") => {
            return Some(Global::Value("a memory format"));
        }
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo") => Class::StorageInfo,
        // Megatron keeps each rank's save plan in the metadata, in some versions in classes of its own.
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
