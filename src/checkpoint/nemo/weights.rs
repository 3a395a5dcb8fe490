//! The tensors of a `.nemo` under the names, and in the shapes, that the model is built from: Hugging Face's.

use std::collections::BTreeMap;

use super::names::{LayerPart, Meaning, Part, meaning};
use crate::checkpoint::schema::{self, Problems};
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::weight::Weight;
use crate::checkpoint::{ModelConfig, torch::ElementType};
use crate::error::clip;
use crate::mmap::MappedFile;

/// The tensors that are part of the architecture, each by itself.
#[derive(Debug, Default)]
pub(super) struct Parts {
    found: BTreeMap<(Part, Option<usize>), (String, ShardedTensor)>,
    /// Names that are no part of it.
    unknown: Vec<String>,
}

impl Parts {
    /// Sorts tensors by what they are.
    ///
    /// # Errors
    /// That two of them are the same part, for the caller to put the file's name before.
    pub fn sort(tensors: Vec<(String, ShardedTensor)>) -> Result<Parts, String> {
        let mut parts = Parts::default();
        for (name, tensor) in tensors {
            match meaning(&name) {
                Meaning::Weight { part, layer } => {
                    if let Some((other, _)) = parts.found.get(&(part, layer)) {
                        return Err(format!(
                            "`{}` and `{}` are the same weights; one too many",
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

    /// Rows of the embedding and the type of its elements.
    ///
    /// # Errors
    /// That there is none.
    pub fn embedding(&self) -> Result<(usize, ElementType), String> {
        let (name, tensor) = self
            .found
            .get(&(Part::Embedding, None))
            .ok_or_else(|| format!("{} is missing", Part::Embedding.described(None)))?;
        match tensor.shape[..] {
            [rows, _] => Ok((rows, tensor.dtype)),
            _ => Err(format!("`{}` has shape {:?}, expected [vocabulary, hidden size]", clip(name), tensor.shape)),
        }
    }

    /// The part `part` of `layer`: by itself, or off the stack of all layers'.
    fn get(&self, part: Part, layer: Option<usize>, layers: usize) -> Option<(&str, Result<ShardedTensor, String>)> {
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
    /// What is missing, too much, or does not fit `config`, by the names in the file.
    pub fn into_weights(self, config: &ModelConfig, files: &[MappedFile]) -> Result<Vec<Weight>, String> {
        let mut problems = Problems::default();
        let mut weights = Vec::new();
        let sizes = Sizes::of(config).ok_or("the sizes overflow")?;
        let layers = config.num_layers;
        let head = (!config.tie_word_embeddings).then_some((Part::Head, None));
        let of_layer = |layer| LayerPart::ALL.into_iter().map(move |part| (Part::Layer(part), Some(layer)));
        let expected = std::iter::once((Part::Embedding, None))
            .chain((0..layers).flat_map(of_layer))
            .chain([(Part::FinalNormWeight, None), (Part::FinalNormBias, None)])
            .chain(head);
        for (part, layer) in expected {
            let shape = sizes.shape(part);
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
                        let named = sizes.named(part, layer, tensor);
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
            let known = match part {
                Part::Layer(_) => layer.is_none_or(|layer| layer < layers),
                Part::Head => !config.tie_word_embeddings,
                _ => true,
            };
            // A stack beside the same part of single layers would be left unread.
            let beside = matches!(part, Part::Layer(_))
                && layer.is_none()
                && (0..layers).any(|layer| self.found.contains_key(&(*part, Some(layer))));
            if !known || beside {
                problems.add(|| format!("`{}` is no part of this model", clip(name)));
            }
        }
        for name in &self.unknown {
            problems.add(|| format!("`{}` is no part of this model", clip(name)));
        }
        problems.finish("model_config.yaml")?;
        Ok(weights)
    }
}

/// The sizes that shapes are made of.
struct Sizes {
    vocab: usize,
    hidden: usize,
    ffn: usize,
    /// Rows of the queries, and of the keys or the values.
    query: usize,
    kv: usize,
    groups: usize,
    head_dim: usize,
}

impl Sizes {
    fn of(config: &ModelConfig) -> Option<Sizes> {
        let query = config.num_heads.checked_mul(config.head_dim)?;
        let kv = config.num_kv_heads.checked_mul(config.head_dim)?;
        query.checked_add(kv.checked_mul(2)?)?;
        Some(Sizes {
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            ffn: config.intermediate_size,
            query,
            kv,
            groups: config.num_kv_heads,
            head_dim: config.head_dim,
        })
    }

    fn shape(&self, part: Part) -> Vec<usize> {
        match part {
            Part::Embedding | Part::Head => vec![self.vocab, self.hidden],
            Part::FinalNormWeight | Part::FinalNormBias => vec![self.hidden],
            Part::Layer(part) => match part {
                LayerPart::Qkv => vec![self.query + 2 * self.kv, self.hidden],
                LayerPart::AttentionOutput => vec![self.hidden, self.query],
                LayerPart::Up => vec![self.ffn, self.hidden],
                LayerPart::Down => vec![self.hidden, self.ffn],
                LayerPart::InputNormWeight
                | LayerPart::InputNormBias
                | LayerPart::PostNormWeight
                | LayerPart::PostNormBias => vec![self.hidden],
            },
        }
    }

    /// A part, of its expected shape, under the model's names.
    fn named(
        &self,
        part: Part,
        layer: Option<usize>,
        tensor: ShardedTensor,
    ) -> Result<Vec<(String, ShardedTensor)>, String> {
        let part = match part {
            Part::Embedding => return Ok(vec![(schema::EMBEDDING.to_owned(), tensor)]),
            Part::Head => return Ok(vec![(schema::HEAD.to_owned(), tensor)]),
            Part::FinalNormWeight => return Ok(vec![("model.norm.weight".to_owned(), tensor)]),
            Part::FinalNormBias => return Ok(vec![("model.norm.bias".to_owned(), tensor)]),
            Part::Layer(part) => part,
        };
        let layer = layer.unwrap_or_default();
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let one = match part {
            LayerPart::InputNormWeight => "input_layernorm.weight",
            LayerPart::InputNormBias => "input_layernorm.bias",
            LayerPart::AttentionOutput => "self_attn.o_proj.weight",
            LayerPart::PostNormWeight => "post_attention_layernorm.weight",
            LayerPart::PostNormBias => "post_attention_layernorm.bias",
            LayerPart::Up => "mlp.up_proj.weight",
            LayerPart::Down => "mlp.down_proj.weight",
            LayerPart::Qkv => {
                let [query, key, value] = self.split(&tensor)?;
                let names = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"].map(name);
                return Ok(names.into_iter().zip([query, key, value]).collect());
            }
        };
        Ok(vec![(name(one), tensor)])
    }

    /// Queries, keys and values of a fused matrix: for each group of heads the rows of its queries, then of its key, then
    /// of its value.
    fn split(&self, fused: &ShardedTensor) -> Result<[ShardedTensor; 3], String> {
        let of_queries = self.query / self.groups;
        let stride = of_queries + 2 * self.head_dim;
        let cut = |offset: usize, rows: usize| {
            let parts = (0..self.groups).map(|group| {
                let first = group * stride + offset;
                fused.rows(first..first + rows)
            });
            ShardedTensor::concat(parts.collect::<Result<_, _>>()?, 0)
        };
        Ok([cut(0, of_queries)?, cut(of_queries, self.head_dim)?, cut(of_queries + self.head_dim, self.head_dim)?])
    }
}
