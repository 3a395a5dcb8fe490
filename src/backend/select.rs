//! Picks the plan to run on this machine and opens its executor.

use super::Executor;
use super::cpu::executor::{CpuExecutor, CpuModel, CpuOptions};
use super::cpu::program::{PROGRAM_VERSION, Program};
use super::tensorrt::{DeviceInfo, GpuOptions, LibraryKind, TensorRtExecutor, TensorRtLibrary, devices, gpu_words};
use crate::checkpoint::ModelConfig;
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, PlanRefusal, PlanRefusals, RefusalReason, Result, clip};
use crate::tensor_file::TensorFile;

/// Options for running an engine.
#[derive(Debug, Clone, Default)]
pub struct ExecutorOptions {
    /// Target whose plan to run. `None` picks a plan for a GPU if that GPU and its library are present, else the CPU's.
    pub target: Option<String>,
    /// Options of CPU plans.
    pub cpu: CpuOptions,
    /// Options of GPU plans.
    pub gpu: GpuOptions,
    /// Runs a GPU plan that has not been verified on this machine, see [`crate::verify`].
    pub accept_unverified: bool,
}

/// The selected plan, and the reason for the choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Index of the plan in the manifest.
    pub plan: usize,
    /// GPU that it runs on; `None` for the CPU.
    pub device: Option<usize>,
    /// A sentence for the user.
    pub reason: String,
}

/// Hardware and libraries of this machine, probed only when a plan asks for them.
pub struct HostProbe<'a> {
    /// Lists the GPUs, or says why they cannot be listed.
    pub devices: &'a dyn Fn() -> Result<Vec<DeviceInfo>, String>,
    /// Checks that a library is installed and usable, or says why not.
    pub library: &'a dyn Fn(LibraryKind) -> Result<(), String>,
}

/// Chooses a plan: the first one for a GPU that is present along with its library, else the CPU's; with a target, only
/// that target's plans. `device` restricts the choice to one GPU.
///
/// # Errors
/// Every plan considered and what it lacks.
pub fn choose(
    plans: &[PlanInfo],
    machine: &HostProbe<'_>,
    target: Option<&str>,
    device: Option<usize>,
) -> Result<Selection, PlanRefusals> {
    let considered = |plan: &&PlanInfo| target.is_none_or(|target| plan.target == target);
    let mut refusals = PlanRefusals {
        target: target.map(str::to_owned),
        targets: plans.iter().map(|plan| plan.target.clone()).collect(),
        plans: Vec::new(),
    };
    let (gpu, cpu): (Vec<_>, Vec<_>) =
        plans.iter().enumerate().filter(|(_, plan)| considered(plan)).partition(|(_, plan)| plan.tensorrt.is_some());
    for (index, plan) in gpu.into_iter().chain(cpu) {
        match place(plan, machine, device) {
            Ok(found) => {
                let device = found.as_ref().map(|gpu| gpu.index);
                let place = found.map_or("the CPU".into(), |gpu| format!("GPU {} ({})", gpu.index, gpu.name));
                let others: String = refusals.plans.iter().map(|refusal| format!("; {refusal}")).collect();
                let reason = format!("plan {} ({}) runs on {place}{others}", plan.target, plan.precision);
                return Ok(Selection { plan: index, device, reason });
            }
            Err(reason) => {
                let (target, precision) = (plan.target.clone(), plan.precision.clone());
                refusals.plans.push(PlanRefusal { target, precision, reason });
            }
        }
    }
    Err(refusals)
}

/// The GPU that a plan runs on, or `None` for the CPU; the error says what is missing.
fn place(plan: &PlanInfo, machine: &HostProbe<'_>, device: Option<usize>) -> Result<Option<DeviceInfo>, RefusalReason> {
    let Some(info) = &plan.tensorrt else {
        return if plan.target == "cpu" { Ok(None) } else { Err(RefusalReason::UnknownTarget) };
    };
    let Some(compiled) = &info.compiled else { return Err(RefusalReason::PreparedOnly) };
    let devices = (machine.devices)().map_err(RefusalReason::NoDriver)?;
    let fits = |gpu: &&DeviceInfo| {
        gpu.compute_capability == info.compute_capability && device.is_none_or(|index| gpu.index == index)
    };
    let Some(gpu) = devices.iter().find(fits) else {
        let here: Vec<String> = devices
            .iter()
            .filter(|gpu| device.is_none_or(|index| gpu.index == index))
            .map(|gpu| format!("GPU {} is {}, {}", gpu.index, gpu.name, gpu_words(gpu.compute_capability)))
            .collect();
        let found = if here.is_empty() { "there is no such GPU".into() } else { here.join(", ") };
        return Err(RefusalReason::OtherGpu { wanted: gpu_words(info.compute_capability), found });
    };
    (machine.library)(compiled.library).map_err(RefusalReason::NoLibrary)?;
    Ok(Some(gpu.clone()))
}

/// Chooses the package's plan for this machine.
///
/// # Errors
/// [`Error::NoPlan`] naming every plan and what it lacks, if none can run here.
pub fn select(package: &Package, options: &ExecutorOptions) -> Result<Selection> {
    let machine = HostProbe {
        devices: &|| devices().map_err(words),
        library: &|kind| TensorRtLibrary::find(kind).map(drop).map_err(words),
    };
    let plans = &package.manifest().plans;
    choose(plans, &machine, options.target.as_deref(), options.gpu.device)
        .map_err(|refusals| Error::NoPlan { path: package.path().to_path_buf(), refusals })
}

/// An error's message without the prefix naming the component that reports it.
fn words(error: Error) -> String {
    match error {
        Error::Gpu(words) | Error::TensorRt(words) => words,
        other => other.to_string(),
    }
}

/// Opens an executor for the plan that [`select`] chooses. On a CPU, weights are memory-mapped, not read; for a GPU
/// they are copied to the device.
///
/// # Errors
/// [`Error::NoPlan`] if no plan can run here; [`Error::Package`] if a plan is inconsistent; any error of opening its
/// executor.
pub fn open(package: &Package, options: &ExecutorOptions) -> Result<Box<dyn Executor>> {
    let selection = select(package, options)?;
    options.gpu.report.fact(&selection.reason);
    open_selected(package, &selection, options)
}

/// Opens an executor for a selected plan.
///
/// # Errors
/// As [`open`].
pub fn open_selected(package: &Package, selection: &Selection, options: &ExecutorOptions) -> Result<Box<dyn Executor>> {
    let (Some(device), Some(plan)) = (selection.device, package.manifest().plans.get(selection.plan)) else {
        let model = open_noted_cpu_model(package, options)?;
        return Ok(Box::new(model.executor(options.cpu.slots)?));
    };
    let gpu = GpuOptions { device: Some(device), ..options.gpu.clone() };
    Ok(Box::new(TensorRtExecutor::open(package, plan, &gpu)?))
}

/// Opens the package's CPU plan.
///
/// # Errors
/// As [`open`].
pub fn open_cpu(package: &Package, options: &CpuOptions) -> Result<CpuExecutor> {
    open_cpu_model(package, options)?.executor(options.slots)
}

/// As [`open_cpu_model`], and reports where another packing would suit this CPU better.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_noted_cpu_model(package: &Package, options: &ExecutorOptions) -> Result<CpuModel> {
    let model = open_cpu_model(package, &options.cpu)?;
    if let Some(note) = model.repacking_note() {
        options.gpu.report.fact(&note);
    }
    Ok(model)
}

/// Opens the package's CPU plan, to be shared by any number of executors.
///
/// # Errors
/// As [`open`].
pub fn open_cpu_model(package: &Package, options: &CpuOptions) -> Result<CpuModel> {
    let (plan, program) = cpu_program(package)?;
    let weights = package.file_path(&plan.weights);
    let weights = if options.copy_weights { TensorFile::copy(&weights)? } else { TensorFile::open(&weights)? };
    let path = package.file_path(program_file(package, plan)?);
    CpuModel::new(program, &path, weights, options)
}

/// The package's CPU plan and its program. The program is validated only when it is opened.
///
/// # Errors
/// [`Error::Package`] if the package has no CPU plan, or one of another version.
pub fn cpu_program(package: &Package) -> Result<(&PlanInfo, Program)> {
    let plans = &package.manifest().plans;
    let Some(plan) = plans.iter().find(|p| p.target == "cpu") else {
        let targets: Vec<&str> = plans.iter().map(|p| p.target.as_str()).collect();
        let detail = format!(
            "it has no plan for this machine's CPU, only for: {}; build one with --recipe cpu",
            if targets.is_empty() { "nothing".into() } else { targets.join(", ") }
        );
        return Err(Error::package(package.path(), detail));
    };
    let file = program_file(package, plan)?;
    let refuse = |detail: String| Error::package(package.path(), format!("{file}: {detail}; build the package again"));
    let program = parse_program(&package.read(file)?).map_err(refuse)?;
    agrees(&program, plan, &package.manifest().model).map_err(refuse)?;
    Ok((plan, program))
}

/// Checks that a CPU plan is of the model that the manifest describes.
fn agrees(program: &Program, plan: &PlanInfo, model: &ModelConfig) -> Result<(), String> {
    let (limits, cache) = (&program.limits, &program.cache);
    if *limits != plan.limits {
        return Err("its limits are not those of the manifest".into());
    }
    let equal = [
        ("layers", cache.layers, "num_layers", model.num_layers),
        ("KV heads", cache.kv_heads, "num_kv_heads", model.num_kv_heads),
        ("dimensions per head", cache.head_dim, "head_dim", model.head_dim),
        ("columns of logits", limits.vocab_size, "vocab_size", model.vocab_size),
        ("bytes of KV cache per token", cache.bytes_per_token(), "kv_bytes_per_token", plan.kv_bytes_per_token),
    ];
    for (what, found, name, stated) in equal {
        if found != stated {
            return Err(format!("it has {found} {what}, but the manifest's {name} is {stated}"));
        }
    }
    let (found, stated) = (limits.max_sequence_tokens, model.max_position_embeddings);
    if found > stated {
        return Err(format!(
            "it holds {found} tokens per sequence, but the manifest's max_position_embeddings is {stated}"
        ));
    }
    Ok(())
}

/// The program file of a CPU plan.
fn program_file<'p>(package: &Package, plan: &'p PlanInfo) -> Result<&'p str> {
    plan.plan.as_deref().ok_or_else(|| {
        let detail = "its plan for the CPU names no program; build the package again";
        Error::package(package.path(), detail)
    })
}

/// Parses a CPU plan's program.
pub(super) fn parse_program(text: &[u8]) -> Result<Program, String> {
    #[derive(serde::Deserialize)]
    struct Head {
        version: u64,
    }
    let head: Head = serde_json::from_slice(text).map_err(|e| format!("not a CPU plan: {}", clip(e)))?;
    if head.version != u64::from(PROGRAM_VERSION) {
        return Err(format!("plan version {}, this aotron runs version {PROGRAM_VERSION}", head.version));
    }
    serde_json::from_slice(text).map_err(clip)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::engine::Limits;
    use crate::engine::tensorrt::{Compiled, Sizes, TensorRtInfo};

    fn plan(target: &str, compute_capability: Option<u16>, library: Option<LibraryKind>) -> PlanInfo {
        let sizes = Sizes {
            max_sequence_tokens: 8,
            position_tokens: 8,
            decode_sequences: 1,
            prefill_sequences: 1,
            prefill_tokens: 8,
            prefill_logits_rows: 1,
            top_tokens: 1,
        };
        let info = |compute_capability| TensorRtInfo {
            compute_capability,
            compiled: library.map(|library| Compiled {
                library,
                version: "1.7.1".into(),
                gpu: None,
                context_plan: None,
                decode_batches: Vec::new(),
            }),
            sizes,
            smaller_classes: Vec::new(),
            bindings: Vec::new(),
            kv_cache_gib: BTreeMap::new(),
            activation_scales: BTreeMap::new(),
        };
        PlanInfo {
            target: target.into(),
            precision: "bf16".into(),
            plan: None,
            weights: "weights/bf16.safetensors".into(),
            limits: Limits { slots: 1, max_sequence_tokens: 8, max_step_tokens: 8, max_logits_rows: 1, vocab_size: 8 },
            kv_bytes_per_token: 1,
            recipe: String::new(),
            tensorrt: compute_capability.map(info),
        }
    }

    fn gpu(index: usize, name: &str, compute_capability: u16) -> DeviceInfo {
        DeviceInfo { index, name: name.into(), compute_capability, memory_bytes: 1 << 36 }
    }

    /// Chooses on a machine with these GPUs (`None`: without a driver) and with TensorRT for RTX only.
    fn choice(
        plans: &[PlanInfo],
        gpus: Option<&[DeviceInfo]>,
        target: Option<&str>,
        device: Option<usize>,
    ) -> Result<(usize, Option<usize>, String), String> {
        let machine = HostProbe {
            devices: &|| gpus.map(<[DeviceInfo]>::to_vec).ok_or("no NVIDIA driver is loaded".into()),
            library: &|kind| if kind == LibraryKind::Rtx { Ok(()) } else { Err("TensorRT is not installed".into()) },
        };
        let chosen = choose(plans, &machine, target, device).map_err(|refusals| refusals.to_string());
        chosen.map(|found| (found.plan, found.device, found.reason))
    }

    fn plans() -> Vec<PlanInfo> {
        let (cpu, h100) = (plan("cpu", None, None), plan("h100", Some(90), Some(LibraryKind::TensorRt)));
        vec![cpu, plan("a100", Some(80), Some(LibraryKind::Rtx)), h100]
    }

    #[test]
    fn a_gpu_that_fits_comes_first() {
        let gpus = [gpu(0, "L40", 89), gpu(1, "A100", 80), gpu(2, "A100", 80)];
        let found = choice(&plans(), Some(&gpus), None, None).unwrap();
        assert_eq!(found, (1, Some(1), "plan a100 (bf16) runs on GPU 1 (A100)".into()));
        assert_eq!(choice(&plans(), Some(&gpus), None, Some(2)).unwrap().1, Some(2));
        let (plan, device, reason) = choice(&plans(), Some(&gpus), None, Some(0)).unwrap();
        assert_eq!((plan, device), (0, None));
        assert!(reason.contains("it requires SM 8.0 (A100), but GPU 0 is L40, SM 8.9"), "{reason}");
        assert_eq!(choice(&plans(), Some(&gpus), Some("cpu"), None).unwrap().0, 0);
    }

    #[test]
    fn the_cpu_runs_what_no_gpu_does_and_says_why() {
        let (plan, device, reason) = choice(&plans(), None, None, None).unwrap();
        assert_eq!((plan, device), (0, None));
        assert!(
            reason.starts_with("plan cpu (bf16) runs on the CPU; plan a100 (bf16) cannot run: no NVIDIA driver"),
            "{reason}"
        );
        let (plan, _, reason) = choice(&plans(), Some(&[gpu(0, "H100", 90)]), None, None).unwrap();
        assert_eq!(plan, 0);
        assert!(reason.contains("plan h100 (bf16) cannot run: TensorRT is not installed"), "{reason}");
        let only = choice(&plans()[..1], None, None, None).unwrap();
        assert_eq!(only.2, "plan cpu (bf16) runs on the CPU");
    }

    #[test]
    fn a_package_without_a_plan_that_fits_says_what_each_lacks() {
        let prepared = [plan("h100", Some(90), None), plan("a100", Some(80), Some(LibraryKind::Rtx))];
        let error = choice(&prepared, Some(&[gpu(0, "H200", 90)]), None, None).unwrap_err();
        assert!(
            error.starts_with("none of its plans can run here; plan h100 (bf16) cannot run: it was prepared only"),
            "{error}"
        );
        assert!(error.contains("plan a100 (bf16) cannot run: it requires SM 8.0 (A100), but GPU 0 is H200"), "{error}");
        let error = choice(&plans(), None, Some("a100"), None).unwrap_err();
        assert!(error.ends_with("plan a100 (bf16) cannot run: no NVIDIA driver is loaded"), "{error}");
        let error = choice(&plans(), None, Some("tpu"), None).unwrap_err();
        assert_eq!(error, "it has no plan for tpu, only for: cpu, a100, h100; build one with --recipe");
        assert!(choice(&[], None, None, None).unwrap_err().contains("only for: nothing"));
        assert!(choice(&plans(), Some(&[]), Some("a100"), None).unwrap_err().contains("there is no such GPU"));
    }

    #[test]
    fn a_caller_can_tell_what_a_plan_lacks() {
        let no_driver = || Err("no NVIDIA driver is loaded".to_owned());
        let one_gpu = || Ok(vec![gpu(0, "H100", 90)]);
        let no_library = |_| Err("TensorRT is not installed".to_owned());
        let lacks = |plan: PlanInfo, machine: &HostProbe<'_>| {
            choose(&[plan], machine, None, None).unwrap_err().plans.remove(0).reason
        };
        let without_driver = HostProbe { devices: &no_driver, library: &no_library };
        let with_gpu = HostProbe { devices: &one_gpu, library: &no_library };
        assert_eq!(lacks(plan("h100", Some(90), None), &without_driver), RefusalReason::PreparedOnly);
        let h100 = || plan("h100", Some(90), Some(LibraryKind::TensorRt));
        assert!(matches!(lacks(h100(), &without_driver), RefusalReason::NoDriver(_)));
        assert!(matches!(lacks(h100(), &with_gpu), RefusalReason::NoLibrary(_)));
        let a100 = plan("a100", Some(80), Some(LibraryKind::Rtx));
        assert!(matches!(lacks(a100, &with_gpu), RefusalReason::OtherGpu { .. }));
        assert_eq!(lacks(plan("tpu", None, None), &with_gpu), RefusalReason::UnknownTarget);
    }
}
