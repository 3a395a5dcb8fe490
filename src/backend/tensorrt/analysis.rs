//! Analysis of the kernels of a step: launches, copies that a better lowering would avoid, and the memory traffic that
//! bounds decoding speed.

use serde::Serialize;

use super::kernels::{GpuKernel, KernelKind, KernelTensor};
use super::lower::PlanWeight;
use crate::engine::tensorrt::{Binding, BindingRole, Extent};
use crate::tensor::DType;

/// The memory bandwidth of a GPU model, which bounds decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// NVIDIA's product name.
    pub name: &'static str,
    /// 80 for SM 8.0.
    pub compute_capability: u16,
    /// Peak memory bandwidth.
    pub bytes_per_second: u64,
}

/// The GPUs that recipes target. Bandwidths are the peaks in NVIDIA's data sheets, "NVIDIA A100 Tensor Core GPU" (1,555
/// GB/s with 40 GB, 2,039 GB/s with 80 GB as SXM) and "NVIDIA H100 Tensor Core GPU" (3.35 TB/s as SXM).
pub const GPUS: [Gpu; 3] = [
    Gpu { name: "A100 40 GB", compute_capability: 80, bytes_per_second: 1_555_000_000_000 },
    Gpu { name: "A100 80 GB", compute_capability: 80, bytes_per_second: 2_039_000_000_000 },
    Gpu { name: "H100 SXM", compute_capability: 90, bytes_per_second: 3_350_000_000_000 },
];

/// Position of a kernel in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelLocation {
    /// Before the first layer.
    Before,
    /// In this layer. A kernel fused across a layer boundary belongs to the later layer.
    Layer(usize),
    /// After the last layer.
    After,
}

/// A kernel that copies data already in memory into another layout or type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Index among the step's kernels.
    pub kernel: usize,
    /// Name of the weight, or of the first cache that the kernel reads, if any.
    pub of: Option<String>,
    /// Type and shape of the copy, or, for a weight whose copy cannot be told from the other outputs, of the source.
    pub what: String,
}

/// [`Copied::of`] and [`Copied::what`] for one kernel.
struct Found {
    of: Option<String>,
    what: String,
}

/// Kernel statistics of one kind of step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepKernels {
    /// Number of kernel launches.
    pub launches: usize,
    /// Launches per layer.
    pub by_layer: Vec<usize>,
    /// Kernels other than GEMMs that read a whole weight matrix. Row lookups do not count.
    pub weight_copies: Vec<Copied>,
    /// Kernels that write a tensor as large as a layer's cache other than the cache itself.
    pub cache_copies: Vec<Copied>,
    /// Position of each kernel, host steps included.
    pub places: Vec<KernelLocation>,
}

impl StepKernels {
    /// Analyzes the kernels of a profile of the plan with these bindings.
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

    /// Fewest and most launches of any layer.
    pub fn layer_launches(&self) -> Option<(usize, usize)> {
        Some((*self.by_layer.iter().min()?, *self.by_layer.iter().max()?))
    }

    /// Launched kernels of a layer.
    pub fn layer<'a>(&'a self, layer: usize, kernels: &'a [GpuKernel]) -> impl Iterator<Item = &'a GpuKernel> {
        let is_here = move |(_, place): &(&GpuKernel, &KernelLocation)| **place == KernelLocation::Layer(layer);
        kernels.iter().zip(&self.places).filter(is_here).map(|(kernel, _)| kernel).filter(|k| k.is_launched())
    }
}

/// The GEMMs of a step that read weights in E4M3, by the type that they multiply in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fp8Products {
    /// Linear layers with weights in E4M3.
    pub layers: usize,
    /// GEMMs that are one operation on E4M3 inputs and weights, with the scales applied to the result.
    pub in_fp8: usize,
    /// The weights, or names of the kernels, that convert E4M3 to a wider type before they multiply, in the GEMM's kernel
    /// or in one before it.
    pub widened: Vec<String>,
}

impl Fp8Products {
    /// Finds the GEMMs among a step's kernels. What a kernel fuses is known by its name, and a name that says nothing counts
    /// as neither.
    pub fn of(kernels: &[GpuKernel], weights: &[PlanWeight]) -> Fp8Products {
        let is_matrix = |tensor: &&KernelTensor| {
            tensor.dtype == DType::F8.to_string() && tensor.dims.len() > 1 && tensor.elements().is_some()
        };
        let is_activation = |tensor: &KernelTensor| {
            tensor.dtype == DType::F8.to_string() && tensor.dims.len() > 1 && tensor.elements().is_none()
        };
        let layers = weights.iter().filter(|weight| weight.dtype == DType::F8 && weight.shape.len() == 2).count();
        let mut found = Fp8Products { layers, ..Fp8Products::default() };
        for kernel in kernels.iter().filter(|kernel| kernel.is_launched()) {
            let Some(codes) = kernel.inputs.iter().chain(&kernel.constants).find(is_matrix) else { continue };
            let operations = kernel.operations();
            let widens = kernel.kind != KernelKind::Gemm
                || operations.iter().take_while(|operation| **operation != "Fc").any(|operation| *operation == "Cast");
            if widens {
                let is_bound = weights.iter().any(|weight| weight.name == codes.name);
                found.widened.push(if is_bound { codes.name.clone() } else { kernel.name.clone() });
            } else if operations.is_empty() && kernel.inputs.iter().any(is_activation) {
                found.in_fp8 += 1;
            }
        }
        found
    }

    /// GEMMs of which the kernels' names do not tell.
    pub fn untold(&self) -> usize {
        self.layers.saturating_sub(self.in_fp8 + self.widened.len())
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

/// Number of elements of a binding without dynamic dimensions.
fn elements(binding: &Binding) -> Option<u64> {
    binding.shape.iter().try_fold(1u64, |product, extent| match extent {
        Extent::Fixed(n) => product.checked_mul(*n as u64),
        Extent::Step(_) => None,
    })
}

/// Returns true for a weight with at least two dimensions other than 1.
fn is_matrix(binding: &Binding) -> bool {
    binding.role == BindingRole::Weight
        && binding.shape.iter().filter(|extent| **extent != Extent::Fixed(1)).count() >= 2
}

/// Returns true if the kernel only looks up rows of the matrix: its name contains a gather, or is truncated (`Etc`),
/// and none of its outputs is as large as the matrix.
fn looks_up(kernel: &GpuKernel, matrix: &Binding) -> bool {
    let operations = kernel.operations();
    let gathers = operations.iter().any(|operation| ["Gath", "Etc"].contains(operation));
    kernel.kind == KernelKind::Fused && gathers && copy_of(kernel, elements(matrix)).is_none()
}

/// The output with this number of elements.
fn copy_of(kernel: &GpuKernel, elements: Option<u64>) -> Option<&KernelTensor> {
    kernel.outputs.iter().find(|output| elements.is_some() && output.elements() == elements)
}

/// Finds a weight matrix that a kernel other than its GEMM reads whole, and the copy it writes.
fn weight_copy(kernel: &GpuKernel, bindings: &[Binding]) -> Option<Found> {
    if kernel.kind == KernelKind::Gemm {
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
    // Embedded codes have no binding. Other constants are small tables of the plan's own.
    let is_codes = |constant: &&KernelTensor| {
        let codes = [DType::I8, DType::I4, DType::F8].iter().any(|dtype| dtype.to_string() == constant.dtype);
        codes && constant.dims.iter().filter(|n| **n != 1).count() >= 2
    };
    let constant = kernel.constants.iter().find(is_codes)?;
    Some(described(&constant.name, constant, constant.elements()))
}

/// Finds an output that holds a layer's cache of at least one sequence: its shape contains both the cache's capacity
/// and head_dim, in three or more dimensions; or its static extents multiply to the cache's element count.
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

/// Positions inferred from the weights and caches that kernels touch and the names TensorRT gives them. A kernel
/// without such a hint inherits the position of the kernel before it.
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
    // A GEMM may be fused with the next layer's norm: its weight matrix is the more reliable hint.
    let matrix = touched().filter(|bound| kernel.kind == KernelKind::Gemm && is_matrix(bound)).find_map(layer_of);
    let own_name = || kernel.operations().is_empty().then(|| layer_number(&kernel.name)).flatten();
    if let Some(layer) = matrix.or_else(|| touched().filter_map(layer_of).max()).or_else(own_name) {
        return KernelLocation::Layer(layer);
    }
    let is_of_no_layer = |bound: &Binding| match bound.role {
        BindingRole::Weight => !is_matrix(bound) || !looks_up(kernel, bound),
        BindingRole::LogitsRows
        | BindingRole::Logits
        | BindingRole::TopLogits
        | BindingRole::TopIds
        | BindingRole::LogitSums => true,
        _ => false,
    };
    match before {
        KernelLocation::Layer(_) if touched().any(is_of_no_layer) => KernelLocation::After,
        _ => before,
    }
}

/// Layer index: 3 for `model.layers.3.mlp.up_proj.weight`.
fn layer_number(name: &str) -> Option<usize> {
    let mut parts = name.split('.').skip_while(|part| *part != "layers");
    parts.nth(1)?.parse().ok()
}

/// Lower bound on the device memory a decode step reads. Activations and writes are smaller by orders of magnitude and
/// not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Bytes of weights read in full, as stored, once per step for all sequences.
    pub weight_bytes: u64,
    /// Bytes of table rows (embedding, rotary tables) per sequence.
    pub row_bytes: u64,
    /// Bytes of keys and values per token of each sequence.
    pub kv_bytes_per_token: u64,
}

impl Traffic {
    /// Traffic of decoding with these kernels. `weights` are all weights of the plan, bound or embedded.
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

    /// Bytes read by a step that decodes one token for each of `sequences` sequences of `tokens` tokens.
    pub fn decode_bytes(&self, sequences: usize, tokens: usize) -> u64 {
        let (sequences, tokens) = (sequences as u64, tokens as u64);
        let each = self.kv_bytes_per_token.saturating_mul(tokens).saturating_add(self.row_bytes);
        self.weight_bytes.saturating_add(each.saturating_mul(sequences))
    }
}

impl Gpu {
    /// Seconds to read `bytes` at peak bandwidth.
    pub fn seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.bytes_per_second as f64
    }
}

#[cfg(test)]
mod tests;
