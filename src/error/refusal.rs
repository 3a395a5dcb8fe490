//! Reasons why none of a package's plans runs on this machine.

use std::fmt;

/// The reasons why none of a package's plans can run here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanRefusals {
    /// The requested target, if any.
    pub target: Option<String>,
    /// Targets that the package has plans for.
    pub targets: Vec<String>,
    /// The plans that were considered; empty if the package has no plan for the target.
    pub plans: Vec<PlanRefusal>,
}

/// A plan that cannot run here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanRefusal {
    /// The plan's target: `"cpu"`, `"a100"`, `"h100"`.
    pub target: String,
    /// The plan's precision.
    pub precision: String,
    /// The missing requirement.
    pub reason: RefusalReason,
}

/// A requirement for running a plan that a machine does not meet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalReason {
    /// The target belongs to another version of aotron.
    UnknownTarget,
    /// The weights are packed, but the plan was not compiled.
    PreparedOnly,
    /// The GPU driver is missing or does not start; its message.
    NoDriver(String),
    /// There is a driver, but none of the GPUs that the plan was compiled for.
    OtherGpu {
        /// The GPU it was compiled for.
        wanted: String,
        /// The GPUs that may be used.
        found: String,
    },
    /// The library that compiled it is missing or has the wrong version; the remedy.
    NoLibrary(String),
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusalReason::UnknownTarget => f.write_str("this aotron does not know its target"),
            RefusalReason::PreparedOnly => {
                f.write_str("it was prepared only; `aotron build PACKAGE --finish` on its GPU compiles it")
            }
            RefusalReason::OtherGpu { wanted, found } => write!(f, "it requires {wanted}, but {found}"),
            RefusalReason::NoDriver(words) | RefusalReason::NoLibrary(words) => f.write_str(words),
        }
    }
}

impl fmt::Display for PlanRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "plan {} ({}) cannot run: {}", self.target, self.precision, self.reason)
    }
}

impl fmt::Display for PlanRefusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.plans.is_empty() {
            let targets = if self.targets.is_empty() { "nothing".into() } else { self.targets.join(", ") };
            let wanted = self.target.as_deref().unwrap_or("any target");
            return write!(f, "it has no plan for {wanted}, only for: {targets}; build one with --recipe");
        }
        f.write_str("none of its plans can run here")?;
        for plan in &self.plans {
            write!(f, "; {plan}")?;
        }
        if !self.targets.iter().any(|target| target == "cpu") {
            f.write_str("; with --recipe cpu a plan is built that runs on any machine")?;
        }
        Ok(())
    }
}
