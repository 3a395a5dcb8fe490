//! The gate between a plan and the runtime: a plan for a GPU answers nothing until it has been verified on this card,
//! with this driver and this library.

use std::fmt::Write;

use super::record::Circumstances;
use super::reference::{Reference, ReferenceAnswers};
use super::tolerance::{limit_on_cpu, limit_on_gpu};
use super::{ErrorLimits, Report, VerifyOptions, verify};
use crate::backend::tensorrt::{DeviceInfo, LibraryKind, TensorRtLibrary, devices, driver_version};
use crate::backend::{Executor, ExecutorOptions, Selection, open_cpu_model, open_selected};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};

/// A selected plan of a package, and what is expected of it.
pub struct Gate<'p> {
    package: &'p Package,
    plan: &'p PlanInfo,
    selection: &'p Selection,
    reference: Option<Reference>,
}

/// An executor that has not been verified yet.
pub struct OpenedPlan {
    /// The executor.
    pub executor: Box<dyn Executor>,
    /// For a CPU plan: the instruction set and the packing that it computes with.
    computed_by: Option<String>,
}

/// Opens an executor for a selected plan. A plan for a GPU is verified first, unless it has passed in the same
/// circumstances or `options.accept_unverified` is set; the report of the GPU's options hears of either.
///
/// # Errors
/// As [`open_selected`]; [`Error::Unproven`] if the plan gives wrong answers.
pub fn open(package: &Package, selection: &Selection, options: &ExecutorOptions) -> Result<Box<dyn Executor>> {
    let Some(device) = selection.device else { return open_selected(package, selection, options) };
    let gate = Gate::new(package, selection)?;
    let mut executor = open_selected(package, selection, options)?;
    let report = &options.gpu.report;
    let name = gate.plan_name();
    let circumstances = gate.circumstances(device, &*executor, options)?;
    if circumstances.have_passed() {
        return Ok(executor);
    }
    if options.accept_unverified {
        report.fact(&format!("{name} runs unverified on GPU {device} ({}), as asked", circumstances.gpu.0));
        return Ok(executor);
    }
    if gate.answers().is_none() {
        let words = "this package has no reference for it, so the CPU's answers cannot be compared";
        report.fact(&format!("{name}: {words}; only its agreement with itself is verified"));
    }
    report.fact(&format!("verifying {name} on GPU {device} ({}), once for this card and driver", circumstances.gpu.0));
    let verdict = gate.verify_executor(&mut *executor, None, &VerifyOptions::default())?;
    if !verdict.passes() {
        return Err(gate.refusal(&verdict));
    }
    report.fact(&format!("verified: {} rows of logits in {:.1} s", verdict.rows(), verdict.seconds));
    if let Err(reason) = circumstances.record(verdict.rows()) {
        report.fact(&format!("the verdict cannot be kept, so the next start verifies again: {reason}"));
    }
    Ok(executor)
}

/// Opens an executor for a selected plan without verifying it, to verify it with [`Gate::verify`].
///
/// # Errors
/// As [`open_selected`].
pub fn open_unchecked(package: &Package, selection: &Selection, options: &ExecutorOptions) -> Result<OpenedPlan> {
    if selection.device.is_some() {
        return Ok(OpenedPlan { executor: open_selected(package, selection, options)?, computed_by: None });
    }
    let executor = open_cpu_model(package, &options.cpu)?.executor(options.cpu.slots)?;
    let computed_by = Some(executor.arithmetic());
    Ok(OpenedPlan { executor: Box::new(executor), computed_by })
}

impl<'p> Gate<'p> {
    /// Reads what a package expects of the selected plan.
    ///
    /// # Errors
    /// [`Error::Package`] if its reference is damaged; [`Error::Internal`] if there is no such plan.
    pub fn new(package: &'p Package, selection: &'p Selection) -> Result<Gate<'p>> {
        let plan = package.manifest().plans.get(selection.plan).ok_or_else(|| {
            Error::internal(format!("plan {} was selected", selection.plan), "the index of a plan in the manifest")
        })?;
        Ok(Gate { package, plan, selection, reference: Reference::of_package(package)? })
    }

    /// The plan.
    pub fn plan(&self) -> &PlanInfo {
        self.plan
    }

    /// The reference's answers, if the package has any for the plan.
    pub fn answers(&self) -> Option<&ReferenceAnswers> {
        self.reference.as_ref()?.answers_for(&self.plan.target)
    }

    /// Verifies an opened plan.
    ///
    /// # Errors
    /// As [`verify()`].
    pub fn verify(&self, opened: &mut OpenedPlan, options: &VerifyOptions<'_>) -> Result<Report> {
        self.verify_executor(&mut *opened.executor, opened.computed_by.as_deref(), options)
    }

    fn verify_executor(
        &self,
        executor: &mut dyn Executor,
        computed_by: Option<&str>,
        options: &VerifyOptions<'_>,
    ) -> Result<Report> {
        let answers = self.answers();
        let (precision, layers) = (&self.plan.precision, self.package.manifest().model.num_layers);
        let is_same = computed_by.is_some() && answers.map(|answers| answers.computed_by.as_str()) == computed_by;
        let limits = match self.selection.device {
            Some(_) => {
                let limit = limit_on_gpu(precision, layers);
                ErrorLimits { alone: limit, reference: limit }
            }
            None if is_same => ErrorLimits { alone: 0.0, reference: 0.0 },
            None => ErrorLimits { alone: 0.0, reference: limit_on_cpu(precision, layers) },
        };
        verify(executor, limits, self.reference.as_ref().zip(answers), options)
    }

    /// Records that an opened plan has passed, so that opening it does not verify it again.
    ///
    /// # Errors
    /// The reason why it cannot be recorded; plans for the CPU are not.
    pub fn keep(&self, opened: &OpenedPlan, report: &Report, options: &ExecutorOptions) -> Result<(), String> {
        let Some(device) = self.selection.device else { return Ok(()) };
        let circumstances =
            self.circumstances(device, &*opened.executor, options).map_err(|error| error.to_string())?;
        circumstances.record(report.rows())
    }

    /// The error for a plan that failed.
    pub fn refusal(&self, report: &Report) -> Error {
        let path = self.package.path();
        let mut detail = format!("{} gives wrong answers", self.plan_name());
        if let Some(device) = self.selection.device {
            let _ = write!(detail, " on GPU {device}");
        }
        let shown = path.display();
        let _ = write!(
            detail,
            ": {}. `aotron verify {shown} --target {}` shows every case",
            report.words(),
            self.plan.target
        );
        detail.push_str(match self.selection.device {
            Some(_) => {
                "; try another version of the driver or of TensorRT and compile the plan again with `aotron build \
                 PACKAGE --finish`, or run it all the same with --accept-unverified"
            }
            None => "; build the package again",
        });
        Error::Unproven { path: path.to_path_buf(), detail }
    }

    fn plan_name(&self) -> String {
        format!("plan {} ({})", self.plan.target, self.plan.precision)
    }

    fn circumstances(
        &self,
        device: usize,
        executor: &dyn Executor,
        options: &ExecutorOptions,
    ) -> Result<Circumstances> {
        let manifest = self.package.manifest();
        let files = self.plan.files().chain(&manifest.reference).map(|path| {
            let digest = manifest.file(path).map_or(String::new(), |info| info.sha256.clone());
            (path.clone(), digest)
        });
        let compiled = self.plan.tensorrt.as_ref().and_then(|info| info.compiled.as_ref());
        let kind = compiled.map_or(LibraryKind::TensorRt, |compiled| compiled.library);
        let version = TensorRtLibrary::find(kind)?.version();
        let DeviceInfo { name, compute_capability, memory_bytes, .. } = devices()?
            .into_iter()
            .nth(device)
            .ok_or_else(|| Error::Gpu(format!("GPU {device} was there a moment ago, but is no longer")))?;
        Ok(Circumstances {
            tool: concat!("aotron ", env!("CARGO_PKG_VERSION")).into(),
            target: self.plan.target.clone(),
            precision: self.plan.precision.clone(),
            gpu: (name, compute_capability, memory_bytes),
            driver: driver_version().map(|driver| driver.to_string()).unwrap_or_default(),
            library: format!("{} {version}", kind.name()),
            files: files.collect(),
            slots: executor.limits().slots,
            graphs: !options.gpu.no_graphs,
        })
    }
}
