//! Packages for tests: built by the library, in silence.

use std::path::Path;

use aotron::compile::{BuildRequest, Precision, Progress, Recipe, build};
use aotron::engine::Package;

struct Quiet;
impl Progress for Quiet {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// Builds and verifies a CPU package.
pub fn build_package(checkpoint: &Path, precision: Precision, output: &Path) -> Package {
    let mut recipe = Recipe::load("cpu").unwrap();
    recipe.precision = precision;
    let (checkpoint, output_folder) = (checkpoint.into(), output.into());
    let request = BuildRequest { checkpoint, recipe, output: output_folder, replace: false, calibration: None };
    build(&request, &Quiet).unwrap();
    let package = Package::open(output).unwrap();
    package.verify(&|_| {}).unwrap();
    package
}
