//! The CPU that a package's CPU plan is packed for.

use std::fmt;

use aotron::backend::cpu_program;
use aotron::engine::Package;
use serde::Serialize;

/// Packing of a CPU plan.
#[derive(Debug, Serialize)]
pub struct CpuPlanFacts {
    /// Name of the CPU, as `build --cpu` takes it.
    packed_for: String,
    /// Names of its linear kernels' packings.
    packings: Vec<&'static str>,
    /// Inputs of quantized linear layers, in a recipe's words.
    activations: &'static str,
}

impl CpuPlanFacts {
    /// Reads them from the package's CPU plan, if it has one.
    pub fn of(package: &Package) -> Option<aotron::Result<CpuPlanFacts>> {
        let has_one = package.manifest().plans.iter().any(|plan| plan.target == "cpu");
        has_one.then(|| {
            let (_, program) = cpu_program(package)?;
            Ok(CpuPlanFacts {
                packed_for: program.cpu.to_string(),
                packings: program.packings(),
                activations: if program.quantizes_activations() { "int8" } else { "float" },
            })
        })
    }
}

impl fmt::Display for CpuPlanFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.packed_for, self.packings.join(", "))?;
        if self.activations == "int8" {
            write!(f, ", with activations in int8")?;
        }
        Ok(())
    }
}
