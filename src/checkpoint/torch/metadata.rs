//! Reader of `torch.distributed.checkpoint`'s `.metadata`: the tensors saved, the chunks of each, and the file and
//! offset of each chunk.
//!
//! The file is a pickle of records. Only their fields are read, by name; see [`super::pickle`].

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::ElementType;
use super::globals::{Class, Dialect, Global};
use super::pickle::{Id, Object, Pickle};
use super::state_dict::{check_bytes, count, counts};
use crate::error::{Error, Result, clip};

/// Maximum numbers of tensors, of chunks over all tensors, and of `storage_data` entries. The 8B model has a dozen
/// stacked tensors with one chunk per layer and rank; objects other than tensors have entries too.
const MAX_TENSORS: usize = 1 << 14;
const MAX_CHUNKS: usize = 1 << 16;
const MAX_ITEMS: usize = 1 << 18;
/// Maximum length of the name of a tensor or a file.
const MAX_NAME_BYTES: usize = 1024;
/// Maximum number of fields of a record; none has ten.
const MAX_FIELDS: usize = 64;

/// Contents of a `.metadata`. Names are those in the file.
#[derive(Debug)]
pub(in crate::checkpoint) struct Metadata<'p> {
    pub tensors: Vec<ChunkedTensor<'p>>,
    pub items: Vec<MetadataItem<'p>>,
}

/// A tensor that was saved in chunks; each lies inside its shape. Coverage is not checked here.
#[derive(Debug)]
pub(in crate::checkpoint) struct ChunkedTensor<'p> {
    pub name: &'p str,
    pub dtype: ElementType,
    /// The product of the sizes, in bytes, fits an `isize`.
    pub shape: Vec<usize>,
    pub chunks: Vec<TensorChunk>,
}

/// A rectangle of a tensor; lists have one entry per axis.
#[derive(Debug)]
pub(in crate::checkpoint) struct TensorChunk {
    pub origin: Vec<usize>,
    pub shape: Vec<usize>,
}

/// Location of a chunk, or of an object that is not a tensor.
#[derive(Debug)]
pub(in crate::checkpoint) struct MetadataItem<'p> {
    /// The tensor's or object's name.
    pub name: &'p str,
    /// The chunk's origin; an object has none.
    pub origin: Option<Vec<usize>>,
    /// The file beside `.metadata`; not validated.
    pub file: &'p str,
    /// Byte range in that file.
    pub bytes: Range<usize>,
    /// Transform that was applied to the bytes, such as compression.
    pub transform: Option<&'p str>,
}

/// Parses the `.metadata` in `bytes`: the tensors whose names are `wanted`, and all locations. `path` names the file in
/// messages.
///
/// # Errors
/// [`Error::Format`] if the file is damaged, imports anything but its own record types, contradicts itself or exceeds a
/// limit.
pub(in crate::checkpoint) fn read_metadata<'p>(
    path: &Path,
    bytes: &'p [u8],
    wanted: impl Fn(&str) -> bool,
) -> Result<Metadata<'p>> {
    let read = || {
        let pickle = Pickle::read(Dialect::Metadata, bytes)?;
        let root = MetadataFields::of_object(&pickle, pickle.root(), Class::Metadata)?;
        let tensors = tensors(&pickle, root.get("state_dict_metadata")?, wanted)?;
        let items = items(&pickle, root.get("storage_data")?)?;
        Ok(Metadata { tensors, items })
    };
    read().map_err(|detail: String| Error::format(path, detail))
}

fn tensors<'p>(
    pickle: &Pickle<'p>,
    entries: Id,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<ChunkedTensor<'p>>, String> {
    let (mut tensors, mut seen, mut chunks_left) = (Vec::new(), HashSet::new(), MAX_CHUNKS);
    for (key, value) in dict(pickle, entries).map_err(|found| format!("`state_dict_metadata` is {found}"))? {
        let name = name(pickle, *key).map_err(|found| format!("a key of `state_dict_metadata` is {found}"))?;
        if !seen.insert(name) {
            return Err(format!("`state_dict_metadata` lists `{}` twice", clip(name)));
        }
        let in_tensor = |detail: String| format!("tensor `{}`: {detail}", clip(name));
        match pickle.get(*value) {
            Object::Record(Class::Bytes, _) => {}
            Object::Record(Class::Tensor, _) if !wanted(name) => {}
            object => {
                if tensors.len() == MAX_TENSORS {
                    return Err(format!("more than {MAX_TENSORS} tensors"));
                }
                tensors.push(tensor(pickle, name, object, &mut chunks_left).map_err(in_tensor)?);
            }
        }
    }
    Ok(tensors)
}

fn tensor<'p>(
    pickle: &Pickle<'p>,
    name: &'p str,
    object: &Object<'p>,
    chunks_left: &mut usize,
) -> Result<ChunkedTensor<'p>, String> {
    let fields = MetadataFields::of_object(pickle, object, Class::Tensor)?;
    let dtype = dtype(pickle, fields.get("properties")?)?;
    let shape = counts(pickle, fields.get("size")?).map_err(|found| format!("its size is {found}"))?;
    check_bytes(&shape, dtype)?;
    let list = match pickle.get(fields.get("chunks")?) {
        Object::List(list) => list,
        other => return Err(format!("its chunks are {}, expected a list", other.kind())),
    };
    *chunks_left = chunks_left
        .checked_sub(list.len())
        .ok_or_else(|| format!("more than {MAX_CHUNKS} chunks in all, the limit"))?;
    let mut chunks = Vec::new();
    for (index, id) in list.iter().enumerate() {
        chunks.push(chunk(pickle, *id, &shape).map_err(|detail| format!("chunk {index}: {detail}"))?);
    }
    Ok(ChunkedTensor { name, dtype, shape, chunks })
}

/// The dtype in a TensorProperties, which pickles itself as a tuple that starts with dtype and layout.
fn dtype(pickle: &Pickle<'_>, properties: Id) -> Result<ElementType, String> {
    let state = match pickle.get(properties) {
        Object::Record(Class::Properties, Some(state)) => pickle.get(*state),
        other => return Err(format!("its properties are {}, expected a TensorProperties with fields", other.kind())),
    };
    let first = match state {
        Object::Tuple(values) => values.first().map(|id| pickle.get(*id)),
        other => return Err(format!("the state of its properties is {}, expected a tuple", other.kind())),
    };
    match first {
        Some(Object::Global(Global::DType(name))) => {
            ElementType::of_dtype(name).ok_or_else(|| format!("its type is {name}, which is not supported"))
        }
        Some(other) => Err(format!("its type is {}, expected one such as torch.bfloat16", other.kind())),
        None => Err("its properties are empty".to_owned()),
    }
}

fn chunk(pickle: &Pickle<'_>, id: Id, whole: &[usize]) -> Result<TensorChunk, String> {
    let fields = MetadataFields::of(pickle, id, Class::Chunk)?;
    let origin = counts(pickle, fields.get("offsets")?).map_err(|found| format!("its offsets are {found}"))?;
    let shape = counts(pickle, fields.get("sizes")?).map_err(|found| format!("its sizes are {found}"))?;
    let ends_inside =
        |((at, size), all): ((&usize, &usize), &usize)| at.checked_add(*size).is_some_and(|end| end <= *all);
    let same_axes = origin.len() == whole.len() && shape.len() == whole.len();
    if !same_axes || !origin.iter().zip(&shape).zip(whole).all(ends_inside) {
        return Err(format!("sizes {shape:?} at {origin:?} exceed the tensor's shape {whole:?}"));
    }
    Ok(TensorChunk { origin, shape })
}

fn items<'p>(pickle: &Pickle<'p>, entries: Id) -> Result<Vec<MetadataItem<'p>>, String> {
    let entries = dict(pickle, entries).map_err(|found| format!("`storage_data` is {found}"))?;
    if entries.len() > MAX_ITEMS {
        return Err(format!("`storage_data` has {} entries, more than the limit of {MAX_ITEMS}", entries.len()));
    }
    let mut items = Vec::new();
    for (number, (key, value)) in entries.iter().enumerate() {
        items.push(item(pickle, *key, *value).map_err(|detail| format!("entry {number} of `storage_data`: {detail}"))?);
    }
    Ok(items)
}

fn item<'p>(pickle: &Pickle<'p>, key: Id, value: Id) -> Result<MetadataItem<'p>, String> {
    let index = MetadataFields::of(pickle, key, Class::Index)?;
    let name = name(pickle, index.get("fqn")?).map_err(|found| format!("its name is {found}"))?;
    let in_item = |detail: String| format!("`{}`: {detail}", clip(name));
    // For an object without an origin, the attribute is missing or None.
    let origin = match index.find("offset")?.filter(|id| !matches!(pickle.get(*id), Object::None)) {
        Some(id) => Some(counts(pickle, id).map_err(|found| in_item(format!("its origin is {found}")))?),
        None => None,
    };
    let read = || {
        let info = MetadataFields::of(pickle, value, Class::StorageInfo)?;
        let file = self::name(pickle, info.get("relative_path")?).map_err(|found| format!("its file is {found}"))?;
        let start = count(pickle, info.get("offset")?).map_err(|found| format!("its offset is {found}"))?;
        let length = count(pickle, info.get("length")?).map_err(|found| format!("its length is {found}"))?;
        let end = start.checked_add(length).ok_or_else(|| format!("{length} bytes at {start} overflow"))?;
        let transform = match info.find("transform_descriptors")? {
            Some(descriptors) => transform(pickle, descriptors)?,
            None => None,
        };
        Ok((file, start..end, transform))
    };
    let (file, bytes, transform) = read().map_err(in_item)?;
    Ok(MetadataItem { name, origin, file, bytes, transform })
}

/// The first name in a list, if any.
fn transform<'p>(pickle: &Pickle<'p>, descriptors: Id) -> Result<Option<&'p str>, String> {
    let first = match pickle.get(descriptors) {
        Object::None => None,
        Object::List(list) | Object::Tuple(list) => list.first(),
        other => return Err(format!("its transform_descriptors are {}, expected a list", other.kind())),
    };
    let name = |id: &Id| name(pickle, *id).map_err(|found| format!("one of its transform_descriptors is {found}"));
    first.map(name).transpose()
}

/// The entries of a dict; the error describes what was found instead.
fn dict<'a>(pickle: &'a Pickle<'_>, id: Id) -> Result<&'a [(Id, Id)], String> {
    match pickle.get(id) {
        Object::Dict(entries) => Ok(entries),
        other => Err(format!("{}, expected a dict", other.kind())),
    }
}

/// A string short enough for a name; the error describes what was found instead.
fn name<'p>(pickle: &Pickle<'p>, id: Id) -> Result<&'p str, String> {
    match pickle.get(id) {
        Object::Str(name) if name.len() > MAX_NAME_BYTES => {
            Err(format!("a string of {} bytes, more than the limit of {MAX_NAME_BYTES}", name.len()))
        }
        Object::Str(name) => Ok(name),
        other => Err(format!("{}, expected a string", other.kind())),
    }
}

/// The fields of a record.
struct MetadataFields<'a, 'p> {
    pickle: &'a Pickle<'p>,
    class: Class,
    entries: &'a [(Id, Id)],
}

impl<'a, 'p> MetadataFields<'a, 'p> {
    fn of(pickle: &'a Pickle<'p>, id: Id, class: Class) -> Result<MetadataFields<'a, 'p>, String> {
        MetadataFields::of_object(pickle, pickle.get(id), class)
    }

    fn of_object(
        pickle: &'a Pickle<'p>,
        object: &'a Object<'p>,
        class: Class,
    ) -> Result<MetadataFields<'a, 'p>, String> {
        let expected = class.kind();
        let state = match object {
            Object::Record(found, state) if *found == class => state,
            other => return Err(format!("found {}, expected {expected}", other.kind())),
        };
        match state.map(|state| pickle.get(state)) {
            Some(Object::Dict(entries)) if entries.len() <= MAX_FIELDS => Ok(MetadataFields { pickle, class, entries }),
            Some(Object::Dict(entries)) => {
                Err(format!("{expected} has {} fields, more than the limit of {MAX_FIELDS}", entries.len()))
            }
            Some(other) => Err(format!("the state of {expected} is {}, expected a dict", other.kind())),
            None => Err(format!("{expected} has no fields")),
        }
    }

    /// The value of an optional field.
    fn find(&self, field: &str) -> Result<Option<Id>, String> {
        let named = |(key, _): &&(Id, Id)| matches!(self.pickle.get(*key), Object::Str(name) if *name == field);
        let mut found = self.entries.iter().filter(named).map(|(_, value)| *value);
        match (found.next(), found.next()) {
            (first, None) => Ok(first),
            (_, Some(_)) => Err(format!("{} has `{field}` twice", self.class.kind())),
        }
    }

    /// The value of a required field.
    fn get(&self, field: &str) -> Result<Id, String> {
        self.find(field)?.ok_or_else(|| format!("{} has no `{field}`", self.class.kind()))
    }
}
