//! Converts the tensors of a `.nemo` to the names and shapes that the model is built from: Hugging Face's.

use std::collections::BTreeMap;

use super::names::{Meaning, NemoTensor, meaning};
use crate::checkpoint::schema::Problems;
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::weight::Weight;
use crate::checkpoint::{ModelConfig, TensorRole, torch::ElementType};
use crate::error::clip;
use crate::mmap::MappedFile;

/// The tensors of a `.nemo`, by their part in the architecture.
#[derive(Debug, Default)]
pub(super) struct Parts {
    found: BTreeMap<(NemoTensor, Option<usize>), (String, ShardedTensor)>,
    /// Names outside the architecture.
    unknown: Vec<String>,
}

impl Parts {
    /// Classifies tensors by name.
    ///
    /// # Errors
    /// If two of them are the same part. The caller prefixes the file's name.
    pub fn sort(tensors: Vec<(String, ShardedTensor)>) -> Result<Parts, String> {
        let mut parts = Parts::default();
        for (name, tensor) in tensors {
            match meaning(&name) {
                Meaning::Weight { tensor: part, layer } => {
                    if let Some((other, _)) = parts.found.get(&(part, layer)) {
                        return Err(format!(
                            "`{}` and `{}` are names of the same tensor, expected one",
                            clip(other),
                            clip(name)
                        ));
                    }
                    parts.found.insert((part, layer), (name, tensor));
                }
                Meaning::Ignored => {}
                Meaning::TiedCopy | Meaning::Unknown => parts.unknown.push(name),
            }
        }
        Ok(parts)
    }

    /// Rows of the embedding and its element type.
    ///
    /// # Errors
    /// If it is missing or not a matrix.
    pub fn embedding(&self) -> Result<(usize, ElementType), String> {
        let (name, tensor) = self
            .found
            .get(&(NemoTensor::EMBEDDING, None))
            .ok_or_else(|| format!("{} is missing", NemoTensor::EMBEDDING.described(None)))?;
        match tensor.shape[..] {
            [rows, _] => Ok((rows, tensor.dtype)),
            _ => Err(format!("`{}` has shape {:?}, expected [vocabulary, hidden size]", clip(name), tensor.shape)),
        }
    }

    /// The part `part` of `layer`: stored by itself, or sliced from the stack of all layers.
    fn get(
        &self,
        part: NemoTensor,
        layer: Option<usize>,
        layers: usize,
    ) -> Option<(&str, Result<ShardedTensor, String>)> {
        if let Some((name, tensor)) = self.found.get(&(part, layer)) {
            return Some((name, Ok(tensor.clone())));
        }
        let (name, stack) = self.found.get(&(part, None))?;
        let of_layer = match stack.shape.first() {
            Some(stacked) if *stacked == layers => stack.at(layer?),
            _ => Err(format!("a stack of shape {:?}, expected {layers} layers", stack.shape)),
        };
        Some((name, of_layer))
    }

    /// All weights of the model in the order of use.
    ///
    /// # Errors
    /// Missing and unexpected tensors, and those that do not match `config`, by their names in the file.
    pub fn into_weights(self, config: &ModelConfig, files: &[MappedFile]) -> Result<Vec<Weight>, String> {
        let mut problems = Problems::default();
        let mut weights = Vec::new();
        let layers = config.num_layers;
        for (part, layer) in in_order(config) {
            let shape = part.shape(config).ok_or("the sizes overflow")?;
            let Some((name, tensor)) = self.get(part, layer, layers) else {
                problems.add(|| format!("{} {shape:?} is missing", part.described(layer)));
                continue;
            };
            match tensor {
                Err(detail) => problems.add(|| format!("`{}` is {detail}", clip(name))),
                Ok(tensor) if tensor.shape != shape => {
                    problems.add(|| format!("`{}` has shape {:?}, expected {shape:?}", clip(name), tensor.shape));
                }
                Ok(tensor) => match tensor.dtype.weight() {
                    None => {
                        let stored = tensor.dtype;
                        problems.add(|| {
                            format!("`{}` is stored as {stored}, expected float32, float16 or bfloat16", clip(name))
                        });
                    }
                    Some(dtype) => {
                        let named = named(part, layer, tensor, config);
                        let made = named.and_then(|named| {
                            named.into_iter().map(|(name, tensor)| Weight::new(name, dtype, &tensor, files)).collect()
                        });
                        match made {
                            Ok(made) => weights.extend::<Vec<Weight>>(made),
                            Err(detail) => problems.add(|| format!("`{}`: {detail}", clip(name))),
                        }
                    }
                },
            }
        }
        for ((part, layer), (name, _)) in &self.found {
            let known = part.is_in(config) && layer.is_none_or(|layer| layer < layers);
            // A stack next to per-layer tensors of the same part would be left unread.
            let beside = part.is_in_layers()
                && layer.is_none()
                && (0..layers).any(|layer| self.found.contains_key(&(*part, Some(layer))));
            if !known || beside {
                problems.add(|| format!("`{}` is not a tensor of this model", clip(name)));
            }
        }
        for name in &self.unknown {
            problems.add(|| format!("`{}` is not a tensor of this model", clip(name)));
        }
        problems.finish("model_config.yaml")?;
        Ok(weights)
    }
}

/// The tensors of the model as a `.nemo` stores them, each with its layer, in the order of use.
fn in_order(config: &ModelConfig) -> Vec<(NemoTensor, Option<usize>)> {
    let all: Vec<NemoTensor> = NemoTensor::all().filter(|tensor| tensor.is_in(config)).collect();
    let mut order = Vec::new();
    for tensors in all.chunk_by(|one, next| one.is_in_layers() == next.is_in_layers()) {
        if tensors[0].is_in_layers() {
            let of_layer = |layer| tensors.iter().map(move |tensor| (*tensor, Some(layer)));
            order.extend((0..config.num_layers).flat_map(of_layer));
        } else {
            order.extend(tensors.iter().map(|tensor| (*tensor, None)));
        }
    }
    order
}

/// Splits `stored`, whose shape has been checked, into the model's tensors.
fn named(
    tensor: NemoTensor,
    layer: Option<usize>,
    stored: ShardedTensor,
    config: &ModelConfig,
) -> Result<Vec<(String, ShardedTensor)>, String> {
    let roles: Vec<TensorRole> = tensor.specs().map(|spec| spec.role).collect();
    // Names outside the layers have no number.
    let name = |role: TensorRole| role.name(layer.unwrap_or(0));
    if let [role] = roles[..] {
        return Ok(vec![(name(role), stored)]);
    }
    // Fused: for each head group, the rows of its queries, then of its key, then of its value.
    let groups = config.num_kv_heads;
    let rows = |role: &TensorRole| role.shape(config).and_then(|shape| Some(shape.first()? / groups));
    let rows: Vec<usize> = roles.iter().map(rows).collect::<Option<_>>().ok_or("the sizes overflow")?;
    let stride: usize = rows.iter().sum();
    let mut offset = 0;
    let mut cut = Vec::with_capacity(roles.len());
    for (role, rows) in roles.into_iter().zip(rows) {
        let of_group = |group: usize| stored.rows(group * stride + offset..group * stride + offset + rows);
        let parts = (0..groups).map(of_group).collect::<Result<_, _>>()?;
        cut.push((name(role), ShardedTensor::concat(parts, 0)?));
        offset += rows;
    }
    Ok(cut)
}
