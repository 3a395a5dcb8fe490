//! A build killed at any moment leaves no package or a whole one, and the next build cleans up behind it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aotron::engine::Package;

const KILLS: u32 = 100;
const CHECKPOINT: &str = "tests/data/tiny-chat";

fn start(output: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(["build", CHECKPOINT, "--recipe", "cpu", "--precision", "f32", "--force", "-o"])
        .arg(output)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_whole(output: &Path) {
    let package = Package::open(output).unwrap();
    package.verify(&|_| {}).unwrap();
}

/// Kills `KILLS` builds, at moments spread over the time a whole one takes. Returns how many had published.
fn kill_builds(output: &Path, must_exist: bool) -> u32 {
    let begin = Instant::now();
    assert!(start(&output.with_file_name("timing")).wait().unwrap().success());
    let whole = begin.elapsed();
    let mut published = 0;
    for kill in 0..KILLS {
        let mut child = start(output);
        std::thread::sleep(whole.mul_f64(1.2 * f64::from(kill) / f64::from(KILLS)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(output.exists() || !must_exist, "kill {kill} lost the package that was there");
        if output.exists() {
            is_whole(output);
            published += 1;
            if !must_exist {
                std::fs::remove_dir_all(output).unwrap();
            }
        }
    }
    std::thread::sleep(Duration::from_millis(10));
    assert!(start(output).wait().unwrap().success());
    is_whole(output);
    let names: Vec<_> = std::fs::read_dir(output.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n != "timing")
        .collect();
    assert_eq!(names, ["engine"], "a killed build's leftovers are still there");
    published
}

#[test]
fn a_killed_build_leaves_nothing_or_a_whole_package() {
    let folder = tempfile::tempdir().unwrap();
    let published = kill_builds(&folder.path().join("engine"), false);
    println!("{published} of {KILLS} killed builds had published");
    assert!(published < KILLS, "no build was killed in time: the test shows nothing");
}

#[test]
fn a_killed_rebuild_leaves_the_old_package_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    assert!(start(&output).wait().unwrap().success());
    kill_builds(&output, true);
}
