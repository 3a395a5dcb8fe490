//! Builds packages for tests through the library, without output.

use std::path::Path;
use std::sync::Arc;

use aotron::compile::{BuildRequest, BuildSummary, Calibration, Precision, Progress, Recipe, WeightRounding, build};
use aotron::engine::Package;

struct Quiet;
impl Progress for Quiet {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// Builds and verifies a CPU package.
pub fn build_package(checkpoint: &Path, precision: Precision, output: &Path) -> Package {
    build_calibrated(checkpoint, precision, output).0
}

/// As [`build_package`], with the calibration of the plan, which is empty for a precision without one.
pub fn build_calibrated(checkpoint: &Path, precision: Precision, output: &Path) -> (Package, Calibration) {
    let mut summary = build_recipes(checkpoint, &[("cpu", precision)], false, output).unwrap();
    let package = Package::open(output).unwrap();
    package.verify(&|_| {}).unwrap();
    (package, summary.plans.remove(0).calibration.unwrap_or_default())
}

/// Builds a package by built-in recipes, with weights rounded to the nearest codes: those that a test can compute again
/// from the checkpoint.
pub fn build_recipes(
    checkpoint: &Path,
    recipes: &[(&str, Precision)],
    prepare: bool,
    output: &Path,
) -> aotron::Result<BuildSummary> {
    let recipe = |(name, precision): &(&str, Precision)| Recipe {
        precision: *precision,
        weight_rounding: WeightRounding::Nearest,
        ..Recipe::load(name).unwrap()
    };
    let request = BuildRequest {
        checkpoint: checkpoint.into(),
        recipes: recipes.iter().map(recipe).collect(),
        output: output.into(),
        replace: false,
        prepare,
        calibration: None,
        chat_format: None,
        reference: true,
    };
    build(&request, &quiet())
}

/// Discards all progress.
pub fn quiet() -> Arc<dyn Progress> {
    Arc::new(Quiet)
}
