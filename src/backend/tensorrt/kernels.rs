//! The kernels of a compiled plan, parsed from the log of its build.
//!
//! A build with [`BuildOptions::list_kernels`](super::BuildOptions::list_kernels) ends its log with a line for each
//! kernel of each profile, in launch order, with everything it reads and writes. This needs no GPU. The format is meant
//! for people and changes between versions of TensorRT, so lines that cannot be parsed are kept and counted, and are
//! not an error.
//! [`super::analysis`] summarizes the kernels of a step.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::{Monitor, Severity};

/// Collects the lines of the log that list kernels, and forwards everything.
pub struct KernelLog {
    next: Arc<dyn Monitor>,
    lines: Mutex<Vec<String>>,
}

impl KernelLog {
    /// A log that forwards everything to `next`.
    pub fn new(next: Arc<dyn Monitor>) -> KernelLog {
        KernelLog { next, lines: Mutex::new(Vec::new()) }
    }

    /// The kernels listed so far.
    pub fn kernels(&self) -> Kernels {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        Kernels::parse(lines.iter().map(String::as_str))
    }
}

impl fmt::Debug for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "KernelLog({} lines)", lines.len())
    }
}

impl Monitor for KernelLog {
    fn log(&self, severity: Severity, line: &str) {
        let listed = line.lines().filter(|line| is_listed(line)).map(str::to_owned);
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).extend(listed);
        self.next.log(severity, line);
    }

    fn phase(&self, name: &str, steps: usize) {
        self.next.phase(name, steps);
    }

    fn step(&self, phase: &str, step: usize) -> ControlFlow<()> {
        self.next.step(phase, step)
    }
}

/// The kernels of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Kernels {
    /// Kernels of each profile, in launch order.
    pub profiles: Vec<Vec<GpuKernel>>,
    /// Lines that could not be parsed.
    pub unread: Vec<String>,
}

/// More profiles than any plan has; a kernel name with a higher index is not trusted.
const MAX_PROFILES: usize = 64;

impl Kernels {
    /// Parses lines of a log. Lines that do not list a kernel are skipped.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Kernels {
        let mut kernels = Kernels::default();
        for line in lines.into_iter().filter(|line| is_listed(line)) {
            match GpuKernel::parse(line) {
                Some((profile, kernel)) if profile < MAX_PROFILES => {
                    if kernels.profiles.len() <= profile {
                        kernels.profiles.resize_with(profile + 1, Vec::new);
                    }
                    kernels.profiles[profile].push(kernel);
                }
                _ => kernels.unread.push(line.to_owned()),
            }
        }
        kernels
    }

    /// Kernels of a profile; empty if there is no such profile.
    pub fn profile(&self, index: usize) -> &[GpuKernel] {
        self.profiles.get(index).map_or(&[], Vec::as_slice)
    }
}

fn is_listed(line: &str) -> bool {
    line.starts_with("Name: ") && line.contains(", LayerType: ")
}

/// Category of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelKind {
    /// GEMM, with the operations fused into it.
    #[serde(rename = "product")] // the name in `aotron inspect`'s JSON
    Gemm,
    /// Fused attention.
    Attention,
    /// Anything else: fused elementwise, row and index operations.
    Fused,
    /// Host step rather than a kernel: shape computation, upload of a constant, stream synchronization.
    Host,
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KernelKind::Gemm => "gemm",
            KernelKind::Attention => "attention",
            KernelKind::Fused => "fused",
            KernelKind::Host => "host",
        })
    }
}

/// A kernel launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuKernel {
    /// TensorRT's name, without the profile and sequence number.
    pub name: String,
    /// Category, as far as name and type tell.
    pub kind: KernelKind,
    /// TensorRT's layer type: `gemm`, `kgen` (generated), `runtime_fusion` (specialized when the plan first runs), …
    pub layer_type: String,
    /// Tensors it reads.
    pub inputs: Vec<KernelTensor>,
    /// Constants of the plan it reads.
    pub constants: Vec<KernelTensor>,
    /// Tensors it writes.
    pub outputs: Vec<KernelTensor>,
}

/// A tensor that a kernel reads or writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelTensor {
    /// Name of the binding, or TensorRT's name for an intermediate value.
    pub name: String,
    /// Shape, -1 for dynamic dimensions.
    pub dims: Vec<i64>,
    /// Element type, named as in [`DType`](crate::tensor::DType) where it has it, else as in TensorRT.
    pub dtype: String,
}

impl KernelTensor {
    /// Number of elements, unless a dimension is dynamic.
    pub fn elements(&self) -> Option<u64> {
        self.dims.iter().try_fold(1u64, |product, n| product.checked_mul(u64::try_from(*n).ok()?))
    }

    /// Type and shape as text: `bf16[-1,192]`.
    pub fn ty(&self) -> String {
        let dims: Vec<String> = self.dims.iter().map(i64::to_string).collect();
        format!("{}[{}]", self.dtype, dims.join(","))
    }
}

impl GpuKernel {
    /// Returns true if it costs a launch on the GPU.
    pub fn is_launched(&self) -> bool {
        self.kind != KernelKind::Host
    }

    /// Fused operations in TensorRT's abbreviations (`Resh`, `Gath`, `Cast`, `Fc` for a GEMM); empty if the name lists
    /// none, and ending with `Etc` if the list is truncated.
    pub fn operations(&self) -> Vec<&str> {
        operations(&self.name)
    }

    /// Parses a line of the log into the profile and the kernel.
    fn parse(line: &str) -> Option<(usize, GpuKernel)> {
        let (full_name, rest) = line.strip_prefix("Name: ")?.split_once(", LayerType: ")?;
        let (layer_type, rest) = rest.split_once(", Inputs: [")?;
        let (inputs, rest) = rest.split_once("], Outputs: [")?;
        let (inputs, constants) = inputs.split_once("], Constants: [").unwrap_or((inputs, ""));
        // A truncated line has no `TacticName`.
        let outputs = rest.split_once("], TacticName: ").map_or(rest, |(outputs, _)| outputs);
        let (name, numbered) = unnumbered(full_name);
        let (name, named) = without_profile(name);
        let kernel = GpuKernel {
            kind: kind(&name, layer_type),
            name,
            layer_type: layer_type.to_owned(),
            inputs: tensors(inputs)?,
            constants: tensors(constants)?,
            outputs: tensors(outputs)?,
        };
        Some((numbered.or(named).unwrap_or(0), kernel))
    }
}

fn kind(name: &str, layer_type: &str) -> KernelKind {
    match layer_type {
        "signal" | "wait" | "shape_call" => KernelKind::Host,
        "copy" if name.starts_with("copy_h2d") => KernelKind::Host,
        "gemm" => KernelKind::Gemm,
        _ if operations(name).contains(&"Fc") => KernelKind::Gemm,
        _ if name.contains("_mha") || name.contains("fmha") => KernelKind::Attention,
        _ => KernelKind::Fused,
    }
}

fn operations(name: &str) -> Vec<&str> {
    let Some(mut rest) = name.strip_prefix("__myl_") else { return Vec::new() };
    let mut operations = Vec::new();
    while !rest.is_empty() {
        let next = rest.char_indices().skip(1).find(|(_, c)| c.is_ascii_uppercase());
        let (operation, others) = rest.split_at(next.map_or(rest.len(), |(at, _)| at));
        operations.push(operation);
        rest = others;
    }
    operations
}

/// Strips profile and sequence number: `__myl_FcCast_myl1_2` is `__myl_FcCast`, kernel 2 of profile 1.
fn unnumbered(name: &str) -> (&str, Option<usize>) {
    let parts = name.rsplit_once("_myl").and_then(|(name, suffix)| {
        let (profile, number) = suffix.split_once('_')?;
        number.parse::<usize>().ok()?;
        Some((name, profile.parse().ok()?))
    });
    parts.map_or((name, None), |(name, profile)| (name, Some(profile)))
}

/// Strips the profile: `total_tokens [profile 1]` is `total_tokens` in profile 1. Profile 0 is not marked.
fn without_profile(name: &str) -> (String, Option<usize>) {
    let Some((before, rest)) = name.split_once(" [profile ") else { return (name.to_owned(), None) };
    match rest.split_once(']') {
        Some((profile, after)) => (format!("{before}{after}"), profile.parse().ok()),
        None => (name.to_owned(), None),
    }
}

/// Parses `{ Name: x, Dimensions: [-1,192], …, Datatype: BFloat16, Format: … }, { …`.
fn tensors(text: &str) -> Option<Vec<KernelTensor>> {
    text.split("{ Name: ").skip(1).map(tensor).collect()
}

fn tensor(text: &str) -> Option<KernelTensor> {
    let (head, rest) = text.split_once("Dimensions: [")?;
    let name = head.split_once(", ").map_or(head, |(name, _)| name);
    let (dims, rest) = rest.split_once(']')?;
    let dims = dims.split(',').map(str::trim).filter(|n| !n.is_empty()).map(|n| n.parse().ok());
    let (_, dtype) = rest.split_once("Datatype: ")?;
    let dtype = dtype.split([',', '}']).next().unwrap_or_default().trim();
    let dtype = match dtype {
        "Float" => "f32",
        "Half" => "f16",
        "BFloat16" => "bf16",
        "Int64" => "i64",
        "Int32" => "i32",
        "Int8" => "i8",
        "Int4" => "i4",
        "FP8" => "f8",
        "Bool" => "bool",
        other => other,
    };
    Some(KernelTensor { name: without_profile(name).0, dims: dims.collect::<Option<_>>()?, dtype: dtype.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of TensorRT for RTX 1.7.1.
    const PRODUCT: &str = "Name: layers.0.attention.o/2.linear [profile 1]_U49_myl1_5, LayerType: gemm, Inputs: [ { Name: \
        __mye25249_myl1, Dimensions: [-1,192], Strides: [192,1], StrideOrder: [1,0], Datatype: BFloat16, Format: \
        (Arbitrary) Format with stride order = [1,2,0] }, { Name: o.weight [profile 1], Dimensions: [192,192], Strides: \
        [1,192], StrideOrder: [0,1], Datatype: BFloat16, Format: (Linear) Row major linear format }], Constants: [ { \
        Name: __mye23648layers.0.attention.o/2.linear [profile 1]_U49_alpha_myl1, Dimensions: [1], Strides: [1], \
        StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: \
        __myln_k_arg__bb24890_90_myl1, Dimensions: [-1,192], Strides: [192,1], StrideOrder: [1,0], Datatype: FP8, \
        Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: ";

    #[test]
    fn a_line_is_a_kernel() {
        let kernels = Kernels::parse([PRODUCT, "Layers:", " Name: logits, IOMode: Output"]);
        assert_eq!(kernels.unread, [""; 0]);
        let [none, kernels] = &kernels.profiles[..] else { panic!("{kernels:#?}") };
        assert_eq!(none, &[]);
        let [kernel] = &kernels[..] else { panic!("{kernels:#?}") };
        assert_eq!((kernel.name.as_str(), kernel.kind), ("layers.0.attention.o/2.linear_U49", KernelKind::Gemm));
        let named = |tensors: &[KernelTensor]| -> Vec<String> {
            tensors.iter().map(|tensor| format!("{} {}", tensor.name, tensor.ty())).collect()
        };
        assert_eq!(named(&kernel.inputs), ["__mye25249_myl1 bf16[-1,192]", "o.weight bf16[192,192]"]);
        assert_eq!(named(&kernel.constants), ["__mye23648layers.0.attention.o/2.linear_U49_alpha_myl1 f32[1]"]);
        assert_eq!(named(&kernel.outputs), ["__myln_k_arg__bb24890_90_myl1 f8[-1,192]"]);
        assert_eq!(kernel.inputs[1].elements(), Some(192 * 192));
        assert_eq!(kernel.inputs[0].elements(), None);
    }

    #[test]
    fn names_say_what_kernels_do() {
        let kind_of = |name: &str, layer_type: &str| {
            let line = format!("Name: {name}, LayerType: {layer_type}, Inputs: [], Constants: [], Outputs: []");
            GpuKernel::parse(&line).map(|(_, kernel)| kernel.kind)
        };
        for (name, layer_type, kind) in [
            ("__myl_FcCastReluMulCast_myl1_7", "runtime_fusion", KernelKind::Gemm),
            ("__myl_CastMulCastFc_myl0_7", "kgen", KernelKind::Gemm),
            ("_gemv_mha_v1_myl1_4", "kgen", KernelKind::Attention),
            ("__myl_ReshTran_myl0_12", "kgen", KernelKind::Fused),
            ("copy_h2d___mye30246_myl0_1", "copy", KernelKind::Host),
            ("copy_of_a_weight_myl0_1", "copy", KernelKind::Fused),
            ("__mye8448_0_myl0_0", "shape_call", KernelKind::Host),
        ] {
            assert_eq!(kind_of(name, layer_type), Some(kind), "{name}");
        }
        assert_eq!(operations("__myl_FcCastReluEtc"), ["Fc", "Cast", "Relu", "Etc"]);
        assert_eq!(operations("_gemv_mha_v1"), [""; 0]);
        assert_eq!(operations("__myl_"), [""; 0]);
        assert_eq!(operations("__myl_éÉ"), ["éÉ"]);
    }

    #[test]
    fn what_cannot_be_read_is_kept() {
        let without = |part: &str| PRODUCT.replacen(part, "", 1);
        let lines = [
            without("Dimensions: ["),
            without("Datatype: "),
            without("], Outputs: ["),
            without(", Inputs: ["),
            PRODUCT.replace("[-1,192]", "[-1,x]"),
            PRODUCT.replace("_myl1_5", "_myl4294967295_5"),
        ];
        let kernels = Kernels::parse(lines.iter().map(String::as_str));
        assert_eq!((kernels.profiles.len(), kernels.unread), (0, lines.to_vec()));
        // No truncation of a line makes the parser panic.
        for end in (0..PRODUCT.len()).filter(|end| PRODUCT.is_char_boundary(*end)) {
            Kernels::parse([&PRODUCT[..end]]);
        }
    }

    /// Records every line.
    #[derive(Default)]
    struct Ear(Mutex<Vec<String>>);

    impl Monitor for Ear {
        fn log(&self, _severity: Severity, line: &str) {
            self.0.lock().unwrap().push(line.to_owned());
        }

        fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }

    #[test]
    fn a_log_keeps_kernels_alone_and_passes_everything_on() {
        let ear = Arc::new(Ear::default());
        let log = KernelLog::new(ear.clone());
        let (noise, list) = ("Tactic: 1", format!("Layers:\n{PRODUCT}\n{PRODUCT}\n\nBindings:"));
        log.log(Severity::Verbose, noise);
        log.log(Severity::Verbose, &list);
        assert_eq!(log.kernels().profile(1).len(), 2);
        assert_eq!(log.kernels().profile(0), &[]);
        assert_eq!(log.kernels().profile(7), &[]);
        assert_eq!(*ear.0.lock().unwrap(), [noise, &list]);
        assert!(log.step("phase", 0).is_break());
        assert_eq!(format!("{log:?}"), "KernelLog(2 lines)");
    }
}
