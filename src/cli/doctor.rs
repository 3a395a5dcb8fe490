//! `aotron doctor`: reports what this machine can build and run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use aotron::backend::tensorrt::{DeviceInfo, LibraryKind, TensorRtLibrary, devices, driver_version};
use aotron::compile::gpu::{PlanCompiler, sm};
use aotron::compile::{Precision, Target, free_bytes};
use aotron::isa::{CPU_VARIABLE, Isa};
use aotron::memory::{available_memory_bytes, total_memory_bytes};
use serde::Serialize;

use super::args::Format;
use super::term;

/// Number of parameters of Nemotron-3-8B.
const PARAMETERS_8B: u64 = 8_540_135_424;
/// Parameters of its linear layers except the LM head: QKV and output projections and the MLP of 32 layers.
const LINEAR_8B: u64 = 32 * (4 * 4096 * 4096 + 2 * 4096 * 16384);
/// Bytes of its KV cache for 4096 tokens in BF16: 32 layers of 2 · 32 heads · 128.
const KV_BYTES_8B: u64 = 4096 * 32 * 2 * 32 * 128 * 2;

/// Compute capabilities that TensorRT for RTX may compile for, each with a GPU that has it.
const COMPUTE_CAPABILITIES: [(u16, &str); 5] =
    [(80, "A100"), (86, "RTX A6000"), (89, "L40"), (90, "H100"), (120, "RTX PRO 6000")];

/// Flags of `aotron doctor`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Findings {
    version: &'static str,
    cpu: Option<String>,
    /// Instruction sets supported by both this CPU and the kernels, simplest first.
    instruction_sets: Vec<String>,
    /// The one that is used: the last, or that which AOTRON_CPU names.
    instruction_set: String,
    /// Cores that this process may use.
    cores: usize,
    memory_bytes: Option<u64>,
    /// Without swapping, and within the control group's limit.
    memory_available_bytes: Option<u64>,
    /// Free space in the current folder.
    disk_free_bytes: Option<u64>,
    /// GPUs visible to CUDA.
    gpus: Vec<String>,
    /// The reason why there are none.
    gpu_problem: Option<String>,
    /// The NVIDIA driver.
    driver: Option<String>,
    tensorrt: Vec<TensorRtFinding>,
    targets: Vec<TargetFinding>,
}

/// One of TensorRT's two libraries.
#[derive(Debug, Serialize)]
struct TensorRtFinding {
    name: &'static str,
    file: &'static str,
    /// The version that this program was compiled against.
    header_version: Option<String>,
    version: Option<String>,
    path: Option<PathBuf>,
    /// Targets for which a test network was compiled just now.
    compiles_for: Vec<String>,
    /// Compilation errors, or the reason why there is no library, with remedies.
    problems: Vec<String>,
}

impl TensorRtFinding {
    fn gather(kind: LibraryKind, devices: &[DeviceInfo]) -> TensorRtFinding {
        let mut finding = TensorRtFinding {
            name: kind.name(),
            file: kind.file_name(),
            header_version: kind.header_version().map(|version| version.to_string()),
            version: None,
            path: None,
            compiles_for: Vec::new(),
            problems: Vec::new(),
        };
        match TensorRtLibrary::find(kind) {
            Ok(library) => {
                finding.version = Some(library.version().to_string());
                finding.path = Some(library.path());
                let driver = library.check_driver();
                // Compiling for a named compute capability needs no driver.
                if driver.is_ok() || kind == LibraryKind::Rtx {
                    finding.try_out(&library, devices);
                }
                finding.problems.extend(driver.err().map(|error| format!("running plans: {}", words(&error))));
            }
            Err(error) => finding.problems.push(words(&error)),
        }
        finding
    }

    fn try_out(&mut self, library: &TensorRtLibrary, devices: &[DeviceInfo]) {
        let named =
            |(sm, gpu): &(u16, &str)| (format!("SM {}.{} ({gpu})", sm / 10, sm % 10), library.compiles_for(Some(*sm)));
        let here = |device: &DeviceInfo| {
            (format!("GPU {} ({})", device.index, device.name), library.compiles_on(device.index))
        };
        let tried: Vec<(String, aotron::Result<()>)> = match library.kind() {
            LibraryKind::Rtx => COMPUTE_CAPABILITIES.iter().map(named).collect(),
            LibraryKind::TensorRt if devices.is_empty() => {
                vec![("the GPU of this machine".into(), library.compiles_for(None))]
            }
            LibraryKind::TensorRt => devices.iter().map(here).collect(),
        };
        for (gpu, result) in tried {
            match result {
                Ok(()) => self.compiles_for.push(gpu),
                Err(error) => self.problems.push(format!("{gpu}: {}", words(&error))),
            }
        }
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(version), Some(path)) = (&self.version, &self.path) {
            lines.push(format!("{version}, {}", term::harmless(&path.display().to_string())));
            let gpus = if self.compiles_for.is_empty() { "nothing".into() } else { self.compiles_for.join(", ") };
            lines.push(format!("compiles for {gpus}"));
            lines.extend(self.problems.iter().map(|problem| format!("not for {}", term::harmless(problem))));
        } else {
            lines.extend(self.problems.iter().map(|problem| term::harmless(problem)));
        }
        lines
    }
}

/// The message of a TensorRT error without the prefix, which already starts its line.
fn words(error: &aotron::Error) -> String {
    match error {
        aotron::Error::TensorRt(words) | aotron::Error::Gpu(words) => words.clone(),
        other => other.to_string(),
    }
}

#[derive(Debug, Serialize)]
struct TargetFinding {
    name: &'static str,
    builds: bool,
    runs: bool,
    /// A GPU is here, but the driver is too old for every library that is.
    needs_newer_driver: bool,
    /// The library that compiles its plans here, or the reason why none does, with remedies.
    how: String,
}

impl TargetFinding {
    fn gather(target: Target, devices: &[DeviceInfo]) -> TargetFinding {
        let name = target.name();
        let Some(capability) = target.compute_capability() else {
            return TargetFinding { name, builds: true, runs: true, needs_newer_driver: false, how: String::new() };
        };
        let is_here = devices.iter().any(|device| device.compute_capability == capability);
        let libraries =
            [LibraryKind::TensorRt, LibraryKind::Rtx].into_iter().filter_map(|k| TensorRtLibrary::find(k).ok());
        let checks: Vec<bool> = libraries.map(|library| library.check_driver().is_ok()).collect();
        let needs_newer_driver = is_here && !checks.is_empty() && !checks.contains(&true);
        let runs = is_here && !needs_newer_driver;
        match PlanCompiler::find(name, capability, false) {
            Ok(means) => TargetFinding { name, builds: true, runs, needs_newer_driver, how: means.describe() },
            Err(error) => TargetFinding { name, builds: false, runs, needs_newer_driver, how: words(&error) },
        }
    }

    fn verdict(&self) -> String {
        let gpu = self.name.to_uppercase();
        match (self.builds, self.runs) {
            (true, _) if self.how.is_empty() => "builds and runs here".into(),
            (true, true) => format!("builds here with {} and runs here", self.how),
            (true, false) if self.needs_newer_driver => {
                format!("builds here with {}; an {gpu} is here, but its driver is too old to run them", self.how)
            }
            (true, false) => format!("builds here with {}; runs on an {gpu}, which this machine lacks", self.how),
            (false, true) => format!("an {gpu} is here, but {}", self.how),
            (false, false) => self.how.clone(),
        }
    }
}

impl Findings {
    fn gather() -> aotron::Result<Findings> {
        let (gpus, gpu_problem) = match devices() {
            Ok(gpus) => (gpus, None),
            Err(error) => (Vec::new(), Some(words(&error))),
        };
        Ok(Findings {
            version: env!("CARGO_PKG_VERSION"),
            cpu: cpu_name(),
            instruction_sets: Isa::available().iter().map(ToString::to_string).collect(),
            instruction_set: Isa::from_environment()?.to_string(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_bytes: total_memory_bytes(),
            memory_available_bytes: available_memory_bytes(),
            disk_free_bytes: free_bytes(Path::new(".")),
            tensorrt: LibraryKind::ALL.into_iter().map(|kind| TensorRtFinding::gather(kind, &gpus)).collect(),
            targets: Target::ALL.into_iter().map(|target| TargetFinding::gather(target, &gpus)).collect(),
            gpus: gpus.iter().map(gpu_words).collect(),
            gpu_problem,
            driver: driver_version().ok().map(|driver| driver.to_string()),
        })
    }
}

fn gpu_words(gpu: &DeviceInfo) -> String {
    format!("{}, SM {}, {}", gpu.name, sm(gpu.compute_capability), term::bytes(gpu.memory_bytes))
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let findings = Findings::gather()?;
    match flags.format {
        Format::Json => term::print_json(&findings),
        Format::Text => print(&findings),
    }
}

fn print(found: &Findings) -> anyhow::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let unknown = || "unknown".to_owned();
    let size = |bytes: Option<u64>| bytes.map_or_else(unknown, term::bytes);
    let mut line = |name: &str, text: String| writeln!(out, "{} {text}", style.dim(format!("{name:<13}")));
    line("aotron", found.version.into())?;
    line("CPU", found.cpu.clone().unwrap_or_else(unknown))?;
    let named =
        if std::env::var_os(CPU_VARIABLE).is_some() { format!("named by {CPU_VARIABLE}, ") } else { String::new() };
    let (set, sets) = (&found.instruction_set, found.instruction_sets.join(", "));
    line("instructions", format!("{set} ({named}of {sets})"))?;
    line("cores", found.cores.to_string())?;
    line("memory", format!("{} available of {}", size(found.memory_available_bytes), size(found.memory_bytes)))?;
    line("disk", format!("{} free in this folder", size(found.disk_free_bytes)))?;
    let none = found.gpu_problem.clone().unwrap_or_else(|| "none that CUDA sees".into());
    for (index, gpu) in found.gpus.iter().chain(found.gpus.is_empty().then_some(&none)).enumerate() {
        line(if index == 0 { "GPU" } else { "" }, term::harmless(gpu))?;
    }
    if let Some(driver) = &found.driver {
        line("driver", term::harmless(driver))?;
    }
    for (label, finding) in ["TensorRT RTX", "TensorRT"].into_iter().zip(&found.tensorrt) {
        for (index, text) in finding.lines().into_iter().enumerate() {
            line(if index == 0 { label } else { "" }, text)?;
        }
    }
    for target in &found.targets {
        // What is wrong with a library was printed above.
        let problems = found.tensorrt.iter().flat_map(|library| library.problems.iter().map(move |it| (library, it)));
        let verdict = problems.fold(target.verdict(), |verdict, (library, problem)| {
            verdict.replace(problem, &format!("{} ({}) is unusable, as said above", library.name, library.file))
        });
        line(&format!("{} plans", target.name), term::harmless(&verdict))?;
    }
    if let Some(available) = found.memory_available_bytes {
        for precision in Precision::ALL {
            let needed = bytes_8b(precision);
            let verdict = if needed <= available { "fits" } else { "does not fit" };
            let text = format!("needs {} for a sequence of 4096 tokens: {verdict}", term::bytes(needed));
            line(&format!("8B in {precision}"), text)?;
        }
    }
    Ok(())
}

/// Bytes of Nemotron-3-8B's weights plus the KV cache for 4096 tokens.
fn bytes_8b(precision: Precision) -> u64 {
    let rest = PARAMETERS_8B - LINEAR_8B;
    match precision {
        Precision::F32 => PARAMETERS_8B * 4 + KV_BYTES_8B * 2,
        Precision::Bf16 => PARAMETERS_8B * 2 + KV_BYTES_8B,
        // The per-channel FP32 scales are negligible.
        Precision::Int8 | Precision::Fp8 | Precision::W8a8 => LINEAR_8B + rest * 2 + KV_BYTES_8B,
        // Half a byte per weight, plus an FP32 scale per group of 128.
        Precision::Int4 => LINEAR_8B / 2 + LINEAR_8B / 32 + rest * 2 + KV_BYTES_8B,
    }
}

/// The processor's name, where the system tells.
pub(super) fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(term::harmless(line.split_once(':')?.1.trim()))
}
