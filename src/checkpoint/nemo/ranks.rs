//! Weights in torch files: one for the whole model, or one per tensor- and pipeline-parallel rank.

use std::collections::BTreeMap;

use super::container::Container;
use super::names::{Meaning, meaning};
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::torch::read_state_dict;
use crate::error::{Error, Result, clip};

/// Weights file of an unsplit model, and of each rank's folder.
const WEIGHTS: &str = "model_weights.ckpt";
/// Maximum number of ranks of each kind.
const MAX_RANKS: usize = 4096;

/// Weights files by pipeline and tensor rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ranks {
    /// `[pipeline ranks][tensor ranks]`, a full grid of at least one.
    members: Vec<Vec<String>>,
}

impl Ranks {
    /// Finds the torch weights files in the container; `None` if there are none.
    ///
    /// # Errors
    /// [`Error::Format`] if layouts are mixed, or a rank's file is missing.
    pub fn find(container: &Container) -> Result<Option<Ranks>> {
        let mut found: BTreeMap<(usize, usize), String> = BTreeMap::new();
        for (name, _) in container.members() {
            let Some(folder) = name.strip_suffix(WEIGHTS) else { continue };
            let Some(rank) = rank_of(folder) else { continue };
            if let Some(other) = found.insert(rank, name.to_owned()) {
                let (name, other) = (clip(name), clip(other));
                let detail = format!("`{name}` and `{other}` are weights of the same rank; remove one of them");
                return Err(Error::format(container.path(), detail));
            }
        }
        let Some(((stages, ranks), _)) = found.last_key_value() else { return Ok(None) };
        let (stages, ranks) =
            (stages + 1, found.keys().map(|(_, tensor)| tensor + 1).max().unwrap_or(1).max(ranks + 1));
        if found.len() != stages * ranks {
            let absent = (0..stages).flat_map(|stage| (0..ranks).map(move |rank| (stage, rank)));
            let missing = absent.into_iter().find(|place| !found.contains_key(place));
            let (stage, rank) = missing.ok_or_else(|| {
                Error::internal(format!("{} ranks with weights", found.len()), format!("{stages} times {ranks}"))
            })?;
            let detail = format!(
                "the weights of pipeline rank {stage}, tensor rank {rank} are missing: found {}, expected {stages} x {ranks}",
                found.len()
            );
            return Err(Error::format(container.path(), detail));
        }
        let mut members = found.into_values();
        Ok(Some(Ranks { members: (0..stages).map(|_| members.by_ref().take(ranks).collect()).collect() }))
    }

    /// Description of the layout, for the user.
    pub fn describe(&self) -> String {
        match (self.members.len(), self.members.first().map_or(1, Vec::len)) {
            (1, 1) => "one torch file".to_owned(),
            (1, ranks) => format!("torch files of {ranks} tensor-parallel ranks"),
            (stages, 1) => format!("torch files of {stages} pipeline stages"),
            (stages, ranks) => format!("torch files of {ranks} tensor-parallel ranks by {stages} pipeline stages"),
        }
    }

    /// Reads the files and merges the ranks: every tensor as it would be in a single file. Tensors outside the
    /// architecture keep their own names, for the caller to reject.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged file, or ranks that are inconsistent; names the file and the tensor.
    pub fn tensors(&self, container: &Container, num_layers: usize) -> Result<Vec<(String, ShardedTensor)>> {
        let stages = self.members.len();
        if !num_layers.is_multiple_of(stages) {
            let detail = format!("{num_layers} layers cannot be divided evenly among {stages} pipeline stages");
            return Err(Error::format(container.path(), detail));
        }
        let layers_per_stage = num_layers / stages;
        let mut merged = Vec::new();
        for (stage, ranks) in self.members.iter().enumerate() {
            let mut parts: BTreeMap<String, Vec<ShardedTensor>> = BTreeMap::new();
            for (rank, member) in ranks.iter().enumerate() {
                let place = container.get(member)?;
                let dict = read_state_dict(&container.member_path(member), container.bytes(place)?)?;
                for tensor in dict.tensors() {
                    let sharded = ShardedTensor::of_torch(tensor, place.file, place.bytes.start);
                    let of_ranks = parts.entry(tensor.name.clone()).or_default();
                    if of_ranks.len() != rank {
                        return Err(missing_in(container, &ranks[of_ranks.len()], &tensor.name, member));
                    }
                    of_ranks.push(sharded);
                }
            }
            for (name, of_ranks) in parts {
                if of_ranks.len() != ranks.len() {
                    return Err(missing_in(container, &ranks[of_ranks.len()], &name, &ranks[0]));
                }
                let (name, axis) = match meaning(&name) {
                    Meaning::Weight { tensor, layer } => {
                        let in_model = layer.map(|layer| layer + stage * layers_per_stage);
                        if layer.is_some_and(|layer| layer >= layers_per_stage) {
                            let detail =
                                format!("`{}` is outside the {layers_per_stage} layers of a stage", clip(&name));
                            return Err(Error::format(container.member_path(&ranks[0]), detail));
                        }
                        (renumbered(&name, layer, in_model), tensor.split_axis())
                    }
                    // The last stage's copy of shared weights.
                    Meaning::TiedCopy if stage > 0 => continue,
                    Meaning::Ignored => continue,
                    Meaning::TiedCopy | Meaning::Unknown => (name, None),
                };
                let whole = match axis {
                    Some(axis) => ShardedTensor::concat(of_ranks, axis).map_err(|detail| {
                        Error::format(container.path(), format!("tensor `{}`: {detail}", clip(&name)))
                    })?,
                    // Replicated on every rank; take the first, as Megatron's own merge does.
                    None => match of_ranks.into_iter().next() {
                        Some(first) => first,
                        None => return Err(Error::internal(format!("no rank has `{}`", clip(&name)), "one for each")),
                    },
                };
                merged.push((name, whole));
            }
        }
        Ok(merged)
    }
}

fn missing_in(container: &Container, member: &str, name: &str, other: &str) -> Error {
    let detail = format!("tensor `{}` is missing, but `{}` has it", clip(name), clip(other));
    Error::format(container.member_path(member), detail)
}

/// `name` with its layer number replaced.
fn renumbered(name: &str, layer: Option<usize>, in_model: Option<usize>) -> String {
    match (layer, in_model) {
        (Some(layer), Some(in_model)) if layer != in_model => {
            name.replacen(&format!(".layers.{layer}."), &format!(".layers.{in_model}."), 1)
        }
        _ => name.to_owned(),
    }
}

/// Pipeline and tensor rank of a weights folder; `None` for any other folder.
fn rank_of(folder: &str) -> Option<(usize, usize)> {
    if folder.is_empty() {
        return Some((0, 0));
    }
    let folder = folder.strip_suffix('/')?;
    let number = |digits: &str| {
        let all = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|number| all && *number < MAX_RANKS)
    };
    if let Some(tensor) = folder.strip_prefix("mp_rank_") {
        return Some((0, number(tensor)?));
    }
    let (tensor, pipeline) = folder.strip_prefix("tp_rank_")?.split_once("_pp_rank_")?;
    Some((number(pipeline)?, number(tensor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_say_their_ranks() {
        for (folder, rank) in [
            ("", Some((0, 0))),
            ("mp_rank_00/", Some((0, 0))),
            ("mp_rank_07/", Some((0, 7))),
            ("tp_rank_01_pp_rank_003/", Some((3, 1))),
            ("mp_rank_/", None),
            ("mp_rank_+1/", None),
            ("mp_rank_9999/", None),
            ("other/", None),
            ("other/mp_rank_00/", None),
        ] {
            assert_eq!(rank_of(folder), rank, "{folder}");
        }
    }

    #[test]
    fn layers_are_numbered_through_the_stages() {
        assert_eq!(renumbered("a.layers.1.b", Some(1), Some(5)), "a.layers.5.b");
        assert_eq!(renumbered("a.layers.1.b", Some(1), Some(1)), "a.layers.1.b");
        assert_eq!(renumbered("a.b", None, None), "a.b");
    }
}
