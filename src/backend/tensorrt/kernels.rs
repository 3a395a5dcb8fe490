//! The kernels of a compiled plan, as the log of its build lists them.
//!
//! A build with [`BuildOptions::list_kernels`](super::BuildOptions::list_kernels) ends its log with a line for each kernel
//! of each profile, in the order of their launches, with everything it reads and writes. No GPU is needed for that. The
//! lines are made for people and differ from one version of TensorRT to the next, so one that cannot be read is kept and
//! counted, and is never an error. What the kernels of a step amount to is [`super::analysis`].

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::{Monitor, Severity};

/// Keeps the lines of the log that list kernels, and passes everything on.
pub struct KernelLog {
    next: Arc<dyn Monitor>,
    lines: Mutex<Vec<String>>,
}

impl KernelLog {
    /// A log that passes everything on to `next`.
    pub fn new(next: Arc<dyn Monitor>) -> KernelLog {
        KernelLog { next, lines: Mutex::new(Vec::new()) }
    }

    /// The kernels that were listed so far.
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
    /// Those of each profile, in the order of their launches.
    pub profiles: Vec<Vec<GpuKernel>>,
    /// Lines that list something which could not be read.
    pub unread: Vec<String>,
}

/// More profiles than any plan has: a name that says so is not read.
const MAX_PROFILES: usize = 64;

impl Kernels {
    /// Reads lines of a log; those that list no kernel are passed over.
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

    /// The kernels of a profile, none if it has none.
    pub fn profile(&self, index: usize) -> &[GpuKernel] {
        self.profiles.get(index).map_or(&[], Vec::as_slice)
    }
}

fn is_listed(line: &str) -> bool {
    line.starts_with("Name: ") && line.contains(", LayerType: ")
}

/// What a kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelKind {
    /// A matrix product, with what is joined to it.
    Product,
    /// Attention.
    Attention,
    /// Anything else: operations on elements, rows and indices, joined.
    Fused,
    /// No kernel but a step on the host: shapes, a constant's upload, two streams waiting for each other.
    Host,
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KernelKind::Product => "product",
            KernelKind::Attention => "attention",
            KernelKind::Fused => "fused",
            KernelKind::Host => "host",
        })
    }
}

/// A launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuKernel {
    /// TensorRT's name, without profile and number.
    pub name: String,
    /// What it does, as far as its name and type say.
    pub kind: KernelKind,
    /// TensorRT's own kind: `gemm`, `kgen` (generated), `runtime_fusion` (specialized when the plan first runs), …
    pub layer_type: String,
    /// What it reads.
    pub inputs: Vec<KernelTensor>,
    /// What it reads that is part of the plan.
    pub constants: Vec<KernelTensor>,
    /// What it writes.
    pub outputs: Vec<KernelTensor>,
}

/// Something that a kernel reads or writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelTensor {
    /// A binding's name, or TensorRT's for a value inside the plan.
    pub name: String,
    /// Sizes; -1 where the step decides.
    pub dims: Vec<i64>,
    /// Element type as in [`DType`](crate::tensor::DType), TensorRT's name for those that it has alone.
    pub dtype: String,
}

impl KernelTensor {
    /// Its elements, if no step decides how many.
    pub fn elements(&self) -> Option<u64> {
        self.dims.iter().try_fold(1u64, |product, n| product.checked_mul(u64::try_from(*n).ok()?))
    }

    /// `bf16[-1,192]`.
    pub fn ty(&self) -> String {
        let dims: Vec<String> = self.dims.iter().map(i64::to_string).collect();
        format!("{}[{}]", self.dtype, dims.join(","))
    }
}

impl GpuKernel {
    /// Whether it costs a launch on the GPU.
    pub fn is_launched(&self) -> bool {
        self.kind != KernelKind::Host
    }

    /// The operations that were joined, as TensorRT abbreviates them (`Resh`, `Gath`, `Cast`, `Fc` for a product);
    /// empty where the name lists none, and ended by `Etc` where it lists not all.
    pub fn operations(&self) -> Vec<&str> {
        operations(&self.name)
    }

    /// A line of the log, and the profile.
    fn parse(line: &str) -> Option<(usize, GpuKernel)> {
        let (full_name, rest) = line.strip_prefix("Name: ")?.split_once(", LayerType: ")?;
        let (layer_type, rest) = rest.split_once(", Inputs: [")?;
        let (inputs, rest) = rest.split_once("], Outputs: [")?;
        let (inputs, constants) = inputs.split_once("], Constants: [").unwrap_or((inputs, ""));
        // What follows is not closed where the line was cut.
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
        "gemm" => KernelKind::Product,
        _ if operations(name).contains(&"Fc") => KernelKind::Product,
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

/// `__myl_FcCast_myl1_2` is `__myl_FcCast` of profile 1, the second of its kernels.
fn unnumbered(name: &str) -> (&str, Option<usize>) {
    let parts = name.rsplit_once("_myl").and_then(|(name, suffix)| {
        let (profile, number) = suffix.split_once('_')?;
        number.parse::<usize>().ok()?;
        Some((name, profile.parse().ok()?))
    });
    parts.map_or((name, None), |(name, profile)| (name, Some(profile)))
}

/// `total_tokens [profile 1]` is `total_tokens` of profile 1; profile 0 is not named.
fn without_profile(name: &str) -> (String, Option<usize>) {
    let Some((before, rest)) = name.split_once(" [profile ") else { return (name.to_owned(), None) };
    match rest.split_once(']') {
        Some((profile, after)) => (format!("{before}{after}"), profile.parse().ok()),
        None => (name.to_owned(), None),
    }
}

/// `{ Name: x, Dimensions: [-1,192], …, Datatype: BFloat16, Format: … }, { …`; `None` if one cannot be read.
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
        assert_eq!((kernel.name.as_str(), kernel.kind), ("layers.0.attention.o/2.linear_U49", KernelKind::Product));
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
            ("__myl_FcCastReluMulCast_myl1_7", "runtime_fusion", KernelKind::Product),
            ("__myl_CastMulCastFc_myl0_7", "kgen", KernelKind::Product),
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
        // No line, however it is cut, ends the program.
        for end in (0..PRODUCT.len()).filter(|end| PRODUCT.is_char_boundary(*end)) {
            Kernels::parse([&PRODUCT[..end]]);
        }
    }

    /// Hears everything too.
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
