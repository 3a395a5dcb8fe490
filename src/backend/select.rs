//! Picks the plan for the machine at hand and opens its executor.

use super::Executor;
use super::cpu::executor::{CpuExecutor, CpuOptions};
use super::cpu::program::{PROGRAM_VERSION, Program};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;

/// How to run an engine.
#[derive(Debug, Clone, Default)]
pub struct ExecutorOptions {
    /// For CPU plans.
    pub cpu: CpuOptions,
}

/// Opens an executor for the package's plan that this machine runs. Weights are mapped, not read.
///
/// # Errors
/// [`Error::Package`] if no plan runs here or a plan does not hold together.
pub fn open(package: &Package, options: &ExecutorOptions) -> Result<Box<dyn Executor>> {
    Ok(Box::new(open_cpu(package, &options.cpu)?))
}

/// Opens the package's CPU plan.
///
/// # Errors
/// As [`open`].
pub fn open_cpu(package: &Package, options: &CpuOptions) -> Result<CpuExecutor> {
    let (plan, program) = cpu_program(package)?;
    let weights = TensorFile::open(&package.file_path(&plan.weights))?;
    let path = package.file_path(plan.plan.as_deref().unwrap_or_default());
    CpuExecutor::new(program, &path, weights, options)
}

/// The package's CPU plan and its program. Whether the program holds together is checked when it is opened.
///
/// # Errors
/// [`Error::Package`] if the package has no such plan or it is not one of this version.
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
    let file = plan.plan.as_deref().unwrap_or_default(); // an empty name is not listed, and refused as that
    let refuse = |detail: String| Error::package(package.path(), format!("{file}: {detail}; build the package again"));
    let text = package.read(file)?;
    #[derive(serde::Deserialize)]
    struct Head {
        version: u64,
    }
    let head: Head = serde_json::from_slice(&text).map_err(|e| refuse(format!("not a CPU plan: {e}")))?;
    if head.version != u64::from(PROGRAM_VERSION) {
        return Err(refuse(format!("plan version {}, this aotron runs version {PROGRAM_VERSION}", head.version)));
    }
    let program: Program = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
    if program.limits != plan.limits {
        return Err(refuse("its limits are not those of the manifest".into()));
    }
    Ok((plan, program))
}
