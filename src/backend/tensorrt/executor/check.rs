//! Compatibility checks of a plan with this machine and its manifest, made before anything is allocated.

use crate::backend::tensorrt::{DeviceInfo, EngineTensor, LibraryKind, Version, gpu_words};
use crate::engine::tensorrt::{Binding, BindingRole, Compiled, Extent, Sizes, TimedOn};
use crate::tensor::DType;

/// Checks the GPU: a plan runs only on GPUs of its own compute capability.
pub(super) fn device(plan: u16, device: &DeviceInfo) -> Result<(), String> {
    if plan == device.compute_capability {
        return Ok(());
    }
    let (found, name) = (gpu_words(device.compute_capability), &device.name);
    Err(format!("it was built for {}, but GPU {} is {name}, {found}", gpu_words(plan), device.index))
}

/// A warning if the plan was timed on another GPU than the one it is to run on: GPUs of one compute capability differ in
/// cores, clocks and memory (H100 PCIe, SXM and NVL, H200), and so do the kernels that are fastest on them.
pub(super) fn timed_on(compiled: &Compiled, device: &DeviceInfo) -> Option<String> {
    let TimedOn { name, memory_bytes } = compiled.gpu.as_ref()?;
    // The total varies by some MB with the driver.
    let near = memory_bytes.abs_diff(device.memory_bytes) < memory_bytes / 20;
    let gigabytes = |bytes: u64| (bytes as f64 / 1e9).round();
    (*name != device.name || !near).then(|| {
        format!(
            "the plan was compiled on {name} ({} GB) and may be slower than it could be on GPU {}, {} ({} GB)",
            gigabytes(*memory_bytes),
            device.index,
            device.name,
            gigabytes(device.memory_bytes)
        )
    })
}

/// Checks the version: TensorRT reads plans of its own minor version. For TensorRT for RTX, the plan's header is
/// checked instead (`TensorRtRuntime::validity`).
pub(super) fn version(compiled: &Compiled, found: Version) -> Result<(), String> {
    let minor = format!("{}.{}.", found.major, found.minor);
    if compiled.library == LibraryKind::Rtx || format!("{}.", compiled.version).starts_with(&minor) {
        return Ok(());
    }
    let name = compiled.library.name();
    Err(format!(
        "it was compiled by {name} {}, but version {found} is installed here, which cannot read it",
        compiled.version
    ))
}

/// Compares the manifest's bindings with the inputs and outputs that the engine reports.
pub(super) fn bindings(bindings: &[Binding], tensors: &[EngineTensor], is_context_plan: bool) -> Result<(), String> {
    let expected = || bindings.iter().filter(|binding| !(is_context_plan && binding.role.limits_cached_keys()));
    let mut problems: Vec<String> = Vec::new();
    for binding in expected() {
        let Some(tensor) = tensors.iter().find(|tensor| tensor.name == binding.name) else {
            problems.push(format!("it has no {binding}"));
            continue;
        };
        let alias = match binding.role {
            BindingRole::UpdatedKeys(layer) => Some(BindingRole::KeyCache(layer)),
            BindingRole::UpdatedValues(layer) => Some(BindingRole::ValueCache(layer)),
            _ => None,
        };
        let alias = alias.and_then(|role| bindings.iter().find(|b| b.role == role)).map(|b| b.name.as_str());
        let same = tensor.is_input != binding.role.is_output()
            && tensor.on_device
            && tensor.dtype == name_of(binding.dtype)
            // Not every version reports the alias; the executor binds both to the same memory anyway.
            && (tensor.alias.is_none() || tensor.alias.as_deref() == alias)
            && same_shape(binding, &tensor.dims);
        if !same {
            problems.push(format!("{} where the manifest has {binding}", describe(tensor)));
        }
    }
    for tensor in tensors.iter().filter(|tensor| expected().all(|binding| binding.name != tensor.name)) {
        problems.push(format!("{}, which the manifest does not list", describe(tensor)));
    }
    match problems.len() {
        0 => Ok(()),
        1..=3 => Err(problems.join("; ")),
        n => Err(format!("{}; and {} more", problems[..3].join("; "), n - 3)),
    }
}

/// Compares the largest shapes of each profile with the manifest's sizes. `largest` asks the engine for the largest
/// shape of an input in a profile, `decode_batches` are the manifest's.
pub(super) fn profiles(
    bindings: &[Binding],
    sizes: &Sizes,
    decode_batches: &[usize],
    count: u32,
    is_context_plan: bool,
    largest: &dyn Fn(&str, u32) -> Vec<i64>,
) -> Result<(), String> {
    let prefill = [sizes.prefill_sequences, sizes.prefill_tokens, sizes.prefill_logits_rows];
    let mut expected = vec![prefill];
    if !is_context_plan {
        expected.extend(sizes.decode_profiles(decode_batches).into_iter().map(|batch| [batch, 1, batch]));
    }
    if count as usize != expected.len() {
        return Err(format!("it has {count} profiles, expected {}", expected.len()));
    }
    for (profile, [b, t, r]) in (0..).zip(expected) {
        for (role, dims) in [(BindingRole::TokenIds, vec![b, t]), (BindingRole::LogitsRows, vec![r])] {
            let Some(binding) = bindings.iter().find(|binding| binding.role == role) else {
                return Err(format!("the manifest has no {role:?}"));
            };
            let found = largest(&binding.name, profile);
            let same = found.len() == dims.len() && found.iter().zip(&dims).all(|(x, y)| i64::try_from(*y) == Ok(*x));
            if !same {
                let name = &binding.name;
                return Err(format!("in profile {profile}, {name} is at most {found:?}, in the manifest {dims:?}"));
            }
        }
    }
    Ok(())
}

fn same_shape(binding: &Binding, dims: &[i64]) -> bool {
    let same = |(extent, dim): (&Extent, &i64)| match extent {
        Extent::Fixed(n) => i64::try_from(*n) == Ok(*dim),
        Extent::Step(_) => *dim == -1,
    };
    binding.shape.len() == dims.len() && binding.shape.iter().zip(dims).all(same)
}

/// The shim's name for an element type.
fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I32 => "i32",
        DType::I8 => "i8",
        DType::I4 => "i4",
        DType::F8 => "f8e4m3",
        DType::Bool => "bool",
    }
}

fn describe(tensor: &EngineTensor) -> String {
    let EngineTensor { name, is_input, dtype, dims, on_device, alias } = tensor;
    let kind = if *is_input { "input" } else { "output" };
    let place = if *on_device { "" } else { " on the host" };
    let alias = alias.as_ref().map(|alias| format!(" in the memory of {alias}")).unwrap_or_default();
    format!("its {kind} {name}: {dtype}{dims:?}{place}{alias}")
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::info;
    use super::*;
    use crate::engine::tensorrt::TensorRtInfo;

    fn manifest() -> TensorRtInfo {
        let sizes = Sizes {
            max_sequence_tokens: 64,
            position_tokens: 64,
            decode_sequences: 4,
            prefill_sequences: 1,
            prefill_tokens: 16,
            prefill_logits_rows: 8,
            top_tokens: 8,
        };
        info(1, 2, 16, &[100], sizes, 1000)
    }

    /// The tensors an engine with these bindings would report.
    fn engine(bindings: &[Binding]) -> Vec<EngineTensor> {
        let dim = |extent: &Extent| if let Extent::Fixed(n) = extent { *n as i64 } else { -1 };
        let tensor = |binding: &Binding| EngineTensor {
            name: binding.name.clone(),
            is_input: !binding.role.is_output(),
            dtype: name_of(binding.dtype).into(),
            dims: binding.shape.iter().map(dim).collect(),
            on_device: true,
            alias: binding.name.strip_prefix("new_").map(str::to_owned),
        };
        bindings.iter().map(tensor).collect()
    }

    #[test]
    fn every_difference_of_the_bindings_is_named() {
        let manifest = manifest();
        let tensors = engine(&manifest.bindings);
        assert_eq!(bindings(&manifest.bindings, &tensors, false), Ok(()));
        let refused = |change: &dyn Fn(&mut Vec<EngineTensor>)| {
            let mut tensors = tensors.clone();
            change(&mut tensors);
            bindings(&manifest.bindings, &tensors, false).unwrap_err()
        };
        let error = refused(&|tensors| drop(tensors.remove(0)));
        assert_eq!(error, "it has no weight.0: bf16[100]");
        let error = refused(&|tensors| tensors[0].dtype = "f32".into());
        assert_eq!(error, "its input weight.0: f32[100] where the manifest has weight.0: bf16[100]");
        let error = refused(&|tensors| tensors[1].dims = vec![-1]);
        assert_eq!(error, "its input token_ids: i32[-1] where the manifest has token_ids: i32[B, T]");
        let error = refused(&|tensors| tensors[1].is_input = false);
        assert!(error.contains("its output token_ids"), "{error}");
        let error = refused(&|tensors| tensors[1].on_device = false);
        assert!(error.contains("on the host"), "{error}");
        let error = refused(&|tensors| tensors.last_mut().unwrap().alias = Some("keys.0".into()));
        assert!(error.contains("its output new_values.0"), "{error}");
        let error = refused(&|tensors| tensors[0].name = "other".into());
        assert!(error.contains("it has no weight.0") && error.contains("its input other"), "{error}");
        assert!(refused(&|tensors| tensors.clear()).ends_with("and 11 more"));

        // The context plan has no attention_mask.
        let first: Vec<EngineTensor> = tensors.iter().filter(|t| t.name != "attention_mask").cloned().collect();
        assert_eq!(bindings(&manifest.bindings, &first, true), Ok(()));
        assert!(bindings(&manifest.bindings, &first, false).unwrap_err().contains("attention_mask"));
        assert!(bindings(&manifest.bindings, &tensors, true).unwrap_err().contains("attention_mask"));
    }

    #[test]
    fn profiles_have_the_sizes_of_the_manifest() {
        let manifest = manifest();
        let largest = |input: &str, profile: u32| match (input, profile) {
            ("token_ids", 0) => vec![1, 16],
            ("token_ids", 1) => vec![4, 1],
            (_, 0) => vec![8],
            _ => vec![4],
        };
        let check = |count, is_context_plan, sizes: &Sizes| {
            profiles(&manifest.bindings, sizes, &[], count, is_context_plan, &largest)
        };
        assert_eq!(check(2, false, &manifest.sizes), Ok(()));
        assert_eq!(check(1, true, &manifest.sizes), Ok(()));
        assert!(check(1, false, &manifest.sizes).unwrap_err().contains("1 profiles"));
        let more = Sizes { decode_sequences: 5, ..manifest.sizes.clone() };
        let error = check(2, false, &more).unwrap_err();
        assert_eq!(error, "in profile 1, token_ids is at most [4, 1], in the manifest [5, 1]");

        let batches = |input: &str, profile: u32| match (input, profile) {
            (_, 0) => largest(input, 0),
            ("token_ids", n) => vec![[1, 3, 4][n as usize - 1], 1],
            (_, n) => vec![[1, 3, 4][n as usize - 1]],
        };
        let check = |decode_batches: &[usize], count| {
            profiles(&manifest.bindings, &manifest.sizes, decode_batches, count, false, &batches)
        };
        // A batch that is not below the largest is none of the class's.
        assert_eq!(check(&[1, 3, 8], 4), Ok(()));
        assert!(check(&[1, 2], 4).unwrap_err().contains("in profile 2, token_ids is at most [3, 1]"));
        assert!(check(&[1, 3], 2).unwrap_err().contains("it has 2 profiles, expected 4"));
    }

    #[test]
    fn gpu_and_library_must_be_the_plans() {
        let a100 = DeviceInfo {
            index: 0,
            name: "NVIDIA A100-SXM4-40GB".into(),
            compute_capability: 80,
            memory_bytes: 42_400_000_000,
        };
        assert_eq!(device(80, &a100), Ok(()));
        assert_eq!(
            device(90, &a100).unwrap_err(),
            "it was built for SM 9.0 (H100, H200), but GPU 0 is NVIDIA A100-SXM4-40GB, SM 8.0 (A100)"
        );
        let compiled = |library, version: &str| Compiled {
            library,
            version: version.into(),
            gpu: None,
            context_plan: None,
            decode_batches: Vec::new(),
        };
        let mut elsewhere = compiled(LibraryKind::TensorRt, "11.4.0");
        assert_eq!(timed_on(&elsewhere, &a100), None);
        elsewhere.gpu = Some(TimedOn { name: a100.name.clone(), memory_bytes: 42_300_000_000 });
        assert_eq!(timed_on(&elsewhere, &a100), None);
        elsewhere.gpu = Some(TimedOn { name: "NVIDIA A100-SXM4-80GB".into(), memory_bytes: 85_000_000_000 });
        assert_eq!(
            timed_on(&elsewhere, &a100).unwrap(),
            "the plan was compiled on NVIDIA A100-SXM4-80GB (85 GB) and may be slower than it could be on GPU 0, NVIDIA \
             A100-SXM4-40GB (42 GB)"
        );
        let found = Version { major: 11, minor: 4, patch: 2 };
        assert_eq!(version(&compiled(LibraryKind::TensorRt, "11.4.0"), found), Ok(()));
        assert_eq!(version(&compiled(LibraryKind::TensorRt, "11.4"), found), Ok(()));
        assert_eq!(version(&compiled(LibraryKind::Rtx, "1.5.0"), Version { major: 1, ..found }), Ok(()));
        let error = version(&compiled(LibraryKind::TensorRt, "11.40.0"), found).unwrap_err();
        assert_eq!(
            error,
            "it was compiled by TensorRT 11.40.0, but version 11.4.2 is installed here, which cannot read it"
        );
    }
}
