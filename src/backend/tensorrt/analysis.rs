//! What the kernels of a step amount to: launches, copies that a better lowering would not need, and the memory traffic
//! that bounds how fast a GPU can decode.

use serde::Serialize;

use super::kernels::{GpuKernel, KernelKind, KernelTensor};
use super::lower::PlanWeight;
use crate::engine::tensorrt::{Binding, BindingRole, Extent};
use crate::tensor::DType;

/// A GPU, by what bounds decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// What NVIDIA calls it.
    pub name: &'static str,
    /// 80 for SM 8.0.
    pub compute_capability: u16,
    /// Peak bandwidth of its memory.
    pub bytes_per_second: u64,
}

/// The GPUs that recipes are for. Bandwidths are the peaks of NVIDIA's data sheets, "NVIDIA A100 Tensor Core GPU" (1,555
/// GB/s with 40 GB, 2,039 GB/s with 80 GB as SXM) and "NVIDIA H100 Tensor Core GPU" (3.35 TB/s as SXM).
pub const GPUS: [Gpu; 3] = [
    Gpu { name: "A100 40 GB", compute_capability: 80, bytes_per_second: 1_555_000_000_000 },
    Gpu { name: "A100 80 GB", compute_capability: 80, bytes_per_second: 2_039_000_000_000 },
    Gpu { name: "H100 SXM", compute_capability: 90, bytes_per_second: 3_350_000_000_000 },
];

/// Where in the model a kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelLocation {
    /// Before the first layer.
    Before,
    /// In this layer. A kernel with the end of one and the begin of the next is of the next.
    Layer(usize),
    /// After the last layer.
    After,
}

/// A kernel that writes again, in another order or type, what is in memory already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Index in the step's kernels.
    pub kernel: usize,
    /// The weight, or the first cache that the kernel reads, if it reads one.
    pub of: Option<String>,
    /// What it writes, or for a weight whose copy cannot be told from the kernel's other outputs, what it reads.
    pub what: String,
}

/// [`Copied::of`] and [`Copied::what`] of a kernel.
struct Found {
    of: Option<String>,
    what: String,
}

/// What one kind of step launches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepKernels {
    /// Launches.
    pub launches: usize,
    /// Launches of each layer.
    pub by_layer: Vec<usize>,
    /// Kernels that are no products and read a whole matrix of weights. One that looks up rows is none.
    pub weight_copies: Vec<Copied>,
    /// Kernels that write something as large as a layer's cache that is not the cache.
    pub cache_copies: Vec<Copied>,
    /// Where each kernel is, also those on the host.
    pub places: Vec<KernelLocation>,
}

impl StepKernels {
    /// Counts the kernels of a profile. `bindings` are those of the plan.
    pub fn of(kernels: &[GpuKernel], bindings: &[Binding]) -> StepKernels {
        let places = places(kernels, bindings);
        let layers = bindings.iter().filter(|b| matches!(b.role, BindingRole::KeyCache(_))).count();
        let mut by_layer = vec![0; layers];
        let launched = || kernels.iter().zip(&places).enumerate().filter(|(_, (kernel, _))| kernel.is_launched());
        for (_, (_, place)) in launched() {
            if let KernelLocation::Layer(layer) = place
                && let Some(count) = by_layer.get_mut(*layer)
            {
                *count += 1;
            }
        }
        let copies = |found: fn(&GpuKernel, &[Binding]) -> Option<Found>| -> Vec<Copied> {
            let copied = |(index, (kernel, _)): (usize, (&GpuKernel, _))| {
                found(kernel, bindings).map(|Found { of, what }| Copied { kernel: index, of, what })
            };
            launched().filter_map(copied).collect()
        };
        StepKernels {
            launches: launched().count(),
            by_layer,
            weight_copies: copies(weight_copy),
            cache_copies: copies(cache_copy),
            places,
        }
    }

    /// Launches of a layer, if all layers have as many; else the fewest and the most.
    pub fn layer_launches(&self) -> Option<(usize, usize)> {
        Some((*self.by_layer.iter().min()?, *self.by_layer.iter().max()?))
    }

    /// Indices of the kernels of a layer that are launched.
    pub fn layer<'a>(&'a self, layer: usize, kernels: &'a [GpuKernel]) -> impl Iterator<Item = &'a GpuKernel> {
        let is_here = move |(_, place): &(&GpuKernel, &KernelLocation)| **place == KernelLocation::Layer(layer);
        kernels.iter().zip(&self.places).filter(is_here).map(|(kernel, _)| kernel).filter(|k| k.is_launched())
    }
}

fn binding<'a>(bindings: &'a [Binding], name: &str) -> Option<&'a Binding> {
    bindings.iter().find(|binding| binding.name == name)
}

fn is_cache(role: BindingRole) -> bool {
    matches!(
        role,
        BindingRole::KeyCache(_)
            | BindingRole::ValueCache(_)
            | BindingRole::UpdatedKeys(_)
            | BindingRole::UpdatedValues(_)
    )
}

/// A binding's elements, if no step decides how many.
fn elements(binding: &Binding) -> Option<u64> {
    binding.shape.iter().try_fold(1u64, |product, extent| match extent {
        Extent::Fixed(n) => product.checked_mul(*n as u64),
        Extent::Step(_) => None,
    })
}

/// Whether it has at least two dimensions that are not 1.
fn is_matrix(binding: &Binding) -> bool {
    binding.role == BindingRole::Weight
        && binding.shape.iter().filter(|extent| **extent != Extent::Fixed(1)).count() >= 2
}

/// Whether the kernel takes some rows of the matrix: its name says it gathers, or does not say all that it does, and
/// nothing it writes is as large as the matrix.
fn looks_up(kernel: &GpuKernel, matrix: &Binding) -> bool {
    let operations = kernel.operations();
    let gathers = operations.iter().any(|operation| ["Gath", "Etc"].contains(operation));
    kernel.kind == KernelKind::Fused && gathers && copy_of(kernel, elements(matrix)).is_none()
}

/// The output that has that many elements.
fn copy_of(kernel: &GpuKernel, elements: Option<u64>) -> Option<&KernelTensor> {
    kernel.outputs.iter().find(|output| elements.is_some() && output.elements() == elements)
}

/// A matrix that the kernel reads whole without being its product, and its copy.
fn weight_copy(kernel: &GpuKernel, bindings: &[Binding]) -> Option<Found> {
    if kernel.kind == KernelKind::Product {
        return None;
    }
    let described = |name: &str, read: &KernelTensor, elements| {
        let what = copy_of(kernel, elements).unwrap_or(read);
        Found { of: Some(name.to_owned()), what: what.ty() }
    };
    let inputs = kernel.inputs.iter().filter_map(|input| Some((input, binding(bindings, &input.name)?)));
    let mut matrices = inputs.filter(|(_, bound)| is_matrix(bound) && !looks_up(kernel, bound));
    if let Some((input, bound)) = matrices.next() {
        return Some(described(&bound.name, input, elements(bound)));
    }
    // Codes that are part of the plan have no binding. Other constants are the plan's own small tables.
    let is_codes = |constant: &&KernelTensor| {
        let codes = [DType::I8, DType::I4, DType::F8].iter().any(|dtype| dtype.to_string() == constant.dtype);
        codes && constant.dims.iter().filter(|n| **n != 1).count() >= 2
    };
    let constant = kernel.constants.iter().find(is_codes)?;
    Some(described(&constant.name, constant, constant.elements()))
}

/// Something the kernel writes that has a layer's cache in it, for one sequence at least: both its tokens and its
/// head_dim among the sizes, beside one for the heads; or as many elements, if no step decides how many.
fn cache_copy(kernel: &GpuKernel, bindings: &[Binding]) -> Option<Found> {
    let cache = bindings.iter().find(|binding| matches!(binding.role, BindingRole::KeyCache(_)))?;
    let &[_, Extent::Fixed(kv_heads), Extent::Fixed(tokens), Extent::Fixed(head_dim)] = &cache.shape[..] else {
        return None;
    };
    let fixed = |n: usize| i64::try_from(n).ok();
    let (kv_heads, tokens, head_dim) = (fixed(kv_heads)?, fixed(tokens)?, fixed(head_dim)?);
    let is_copy = |output: &&KernelTensor| {
        let position = |size: i64| output.dims.iter().position(|n| *n == size);
        let has_both = match position(tokens) {
            Some(at) => output.dims.iter().enumerate().any(|(other, n)| other != at && *n == head_dim),
            None => false,
        };
        let flat = output.dims.iter().filter(|n| **n > 0).try_fold(1i64, |product, n| product.checked_mul(*n));
        let whole = kv_heads.checked_mul(tokens).and_then(|n| n.checked_mul(head_dim));
        let is_bound = binding(bindings, &output.name).is_some();
        !is_bound && (has_both && output.dims.len() >= 3 || flat.is_some() && flat == whole)
    };
    let output = kernel.outputs.iter().find(is_copy)?;
    let read = kernel.inputs.iter().find(|input| binding(bindings, &input.name).is_some_and(|b| is_cache(b.role)));
    Some(Found { of: read.map(|input| input.name.clone()), what: output.ty() })
}

/// By the weights and caches that kernels read and write, and the names TensorRT gives them. A kernel that has no such
/// names is where the one before it is.
fn places(kernels: &[GpuKernel], bindings: &[Binding]) -> Vec<KernelLocation> {
    let mut place = KernelLocation::Before;
    kernels
        .iter()
        .map(|kernel| {
            place = placed(kernel, bindings, place);
            place
        })
        .collect()
}

fn placed(kernel: &GpuKernel, bindings: &[Binding], before: KernelLocation) -> KernelLocation {
    let touched = || {
        let tensors = kernel.inputs.iter().chain(&kernel.outputs);
        tensors.filter_map(|tensor| binding(bindings, &tensor.name))
    };
    let layer_of = |bound: &Binding| match bound.role {
        BindingRole::KeyCache(n)
        | BindingRole::ValueCache(n)
        | BindingRole::UpdatedKeys(n)
        | BindingRole::UpdatedValues(n) => Some(n),
        _ => layer_number(&bound.name),
    };
    // The matrix of a product is surer than what the next layer's norm, joined to it, reads.
    let matrix = touched().filter(|bound| kernel.kind == KernelKind::Product && is_matrix(bound)).find_map(layer_of);
    let own_name = || kernel.operations().is_empty().then(|| layer_number(&kernel.name)).flatten();
    if let Some(layer) = matrix.or_else(|| touched().filter_map(layer_of).max()).or_else(own_name) {
        return KernelLocation::Layer(layer);
    }
    let is_of_no_layer = |bound: &Binding| match bound.role {
        BindingRole::Weight => !is_matrix(bound) || !looks_up(kernel, bound),
        BindingRole::LogitsRows | BindingRole::Logits | BindingRole::TopLogits | BindingRole::TopIds => true,
        _ => false,
    };
    match before {
        KernelLocation::Layer(_) if touched().any(is_of_no_layer) => KernelLocation::After,
        _ => before,
    }
}

/// 3 of `model.layers.3.mlp.up_proj.weight`.
fn layer_number(name: &str) -> Option<usize> {
    let mut parts = name.split('.').skip_while(|part| *part != "layers");
    parts.nth(1)?.parse().ok()
}

/// What a step that decodes reads from the GPU's memory, at least. Activations, and what is written, are thousands of
/// times less and not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Weights that are read whole, as they are stored, once for all sequences.
    pub weight_bytes: u64,
    /// Rows of tables (the embedding, the rotation's), for each sequence.
    pub row_bytes: u64,
    /// Keys and values, for each token of each sequence.
    pub kv_bytes_per_token: u64,
}

impl Traffic {
    /// The traffic of decoding with these kernels. `weights` are all that the plan has, bound or part of it.
    pub fn of(decode: &[GpuKernel], bindings: &[Binding], weights: &[PlanWeight]) -> Traffic {
        let mut traffic = Traffic { weight_bytes: 0, row_bytes: 0, kv_bytes_per_token: 0 };
        for weight in weights {
            let bound = binding(bindings, &weight.name);
            let reads = |kernel: &&GpuKernel| kernel.inputs.iter().any(|input| input.name == weight.name);
            let is_table = bound.is_some_and(|bound| {
                let mut readers = decode.iter().filter(reads).peekable();
                is_matrix(bound) && readers.peek().is_some() && readers.all(|kernel| looks_up(kernel, bound))
            });
            match weight.shape.first() {
                Some(rows) if is_table => traffic.row_bytes += weight.bytes() / (*rows).max(1) as u64,
                _ => traffic.weight_bytes += weight.bytes(),
            }
        }
        for cache in bindings.iter().filter(|b| matches!(b.role, BindingRole::KeyCache(_) | BindingRole::ValueCache(_)))
        {
            if let &[_, Extent::Fixed(kv_heads), _, Extent::Fixed(head_dim)] = &cache.shape[..] {
                traffic.kv_bytes_per_token += (kv_heads * head_dim * cache.dtype.bytes()) as u64;
            }
        }
        traffic
    }

    /// Bytes of a step that decodes a token of each of so many sequences, which have so many each.
    pub fn decode_bytes(&self, sequences: usize, tokens: usize) -> u64 {
        let (sequences, tokens) = (sequences as u64, tokens as u64);
        let each = self.kv_bytes_per_token.saturating_mul(tokens).saturating_add(self.row_bytes);
        self.weight_bytes.saturating_add(each.saturating_mul(sequences))
    }
}

impl Gpu {
    /// The least time that reading so much takes.
    pub fn seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.bytes_per_second as f64
    }
}

#[cfg(test)]
mod tests;
