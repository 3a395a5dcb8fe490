//! Files that the real writers wrote (tests/data/nemo, made by tools/make_nemo_fixtures.py).

use std::path::{Path, PathBuf};

use super::super::{Checkpoint, TensorView, is_checkpoint, read_config};

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/data/nemo").join(name)
}

fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir("tests/data/nemo").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".nemo")).collect();
    names.sort();
    names
}

fn data(view: &TensorView<'_>) -> Vec<u8> {
    view.raw(0..view.elements()).into_owned()
}

#[test]
fn every_layout_holds_the_same_model() {
    let reference = Checkpoint::open(&fixture("hf")).unwrap();
    let names = fixtures();
    assert!(names.len() >= 18, "{names:?}");
    for name in names {
        assert!(is_checkpoint(&fixture(&name)), "{name}");
        let checkpoint = Checkpoint::open(&fixture(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(checkpoint.format(), "nemo");
        let (config, expected) = (checkpoint.config().clone(), reference.config().clone());
        let padding = config.vocab_size - expected.vocab_size;
        assert_eq!(padding > 0, name.contains("padded"), "{name}");
        let ids = (config.bos_token_id, config.eos_token_ids.clone());
        assert_eq!(ids, (None, vec![]), "{name}: the tokenizer says them");
        let same = crate::checkpoint::ModelConfig {
            vocab_size: expected.vocab_size,
            bos_token_id: expected.bos_token_id,
            eos_token_ids: expected.eos_token_ids.clone(),
            ..config.clone()
        };
        assert_eq!(same, expected, "{name}");
        assert_eq!(read_config(&fixture(&name)).unwrap(), config);
        let of_both = checkpoint.tensors().zip(reference.tensors());
        assert_eq!(checkpoint.tensors().count(), reference.tensors().count());
        for (found, expected) in of_both {
            assert_eq!((found.name, found.dtype), (expected.name, expected.dtype), "{name}");
            let expected_data = data(&expected);
            if found.shape == expected.shape {
                assert_eq!(data(&found), expected_data, "{name}: {}", found.name);
            } else {
                assert_eq!(found.shape[0], expected.shape[0] + padding, "{name}: {}", found.name);
                assert_eq!(data(&found)[..expected_data.len()], expected_data[..], "{name}: {}", found.name);
            }
        }
        let tokenizer = checkpoint.tokenizer_file(1 << 20).unwrap().unwrap();
        assert!(!tokenizer.is_json);
        assert_eq!(tokenizer.bytes, std::fs::read(fixture("hf/tokenizer.model")).unwrap(), "{name}");
    }
}

/// Unpacks an archive as tar does.
fn unpack(name: &str, folder: &Path) {
    let status = std::process::Command::new("tar").arg("-xf").arg(fixture(name)).arg("-C").arg(folder).status();
    assert!(status.unwrap().success());
}

#[test]
fn an_unpacked_folder_is_the_archive() {
    for name in ["ckpt-mcore.nemo", "ckpt-tp2-pp2.nemo", "zarr-tp2.nemo", "torch-dist-tp2.nemo"] {
        let folder = tempfile::tempdir().unwrap();
        unpack(name, folder.path());
        assert!(is_checkpoint(folder.path()));
        let (one, other) = (Checkpoint::open(&fixture(name)).unwrap(), Checkpoint::open(folder.path()).unwrap());
        for (one, other) in one.tensors().zip(other.tensors()) {
            assert_eq!((one.name, data(&one)), (other.name, data(&other)), "{name}");
        }
    }
}

/// The error of opening an unpacked archive after `change` was made to its folder.
#[track_caller]
fn refused(name: &str, change: impl FnOnce(&Path), reason: &str) {
    let folder = tempfile::tempdir().unwrap();
    unpack(name, folder.path());
    change(folder.path());
    let error = Checkpoint::open(folder.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(&folder.path().display().to_string()), "{error}");
    assert!(error.contains(reason), "{error}\nexpected: {reason}");
}

fn edit(folder: &Path, from: &str, to: &str) {
    let path = folder.join("model_config.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn refuses_what_does_not_fit_together() {
    let remove = |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    refused("ckpt-mcore.nemo", remove("model_config.yaml"), "config.json");
    refused(
        "ckpt-mcore.nemo",
        remove("model_weights.ckpt"),
        "no weights: expected model_weights.ckpt, the same in folders such as mp_rank_00",
    );
    refused(
        "ckpt-tp4.nemo",
        remove("mp_rank_02/model_weights.ckpt"),
        "the weights of pipeline rank 0, tensor rank 2 are missing: found 3, expected 1 x 4",
    );
    refused("ckpt-tp2-pp2.nemo", remove("tp_rank_01_pp_rank_001/model_weights.ckpt"), "pipeline rank 1, tensor rank 1");
    refused(
        "ckpt-tp2.nemo",
        |folder| std::fs::write(folder.join("model_weights.ckpt"), "").unwrap(),
        "are weights of the same rank",
    );
    refused(
        "zarr.nemo",
        |folder| std::fs::write(folder.join("model_weights.ckpt"), "").unwrap(),
        "both one torch file and a distributed checkpoint in model_weights/",
    );
    refused(
        "zarr.nemo",
        |folder| std::fs::write(folder.join("model_weights/metadata.json"), r#"{"sharded_backend": "other"}"#).unwrap(),
        "sharded_backend is \"other\", expected \"zarr\" or \"torch_dist\"",
    );
    refused("ckpt-mcore.nemo", |folder| edit(folder, "num_layers: 4", "num_layers: 3"), "is outside the 3 layers");
    refused("ckpt-mcore.nemo", |folder| edit(folder, "num_layers: 4", "num_layers: 5"), "layers.4.self_attention");
    refused(
        "ckpt-pp2.nemo",
        |folder| edit(folder, "num_layers: 4", "num_layers: 5"),
        "5 layers cannot be divided evenly among 2 pipeline stages",
    );
    refused("zarr.nemo", |folder| edit(folder, "num_layers: 4", "num_layers: 3"), "expected 3 layers");
    refused(
        "ckpt-mcore.nemo",
        |folder| {
            let weights = std::fs::read(folder.join("model_weights.ckpt")).unwrap();
            std::fs::write(folder.join("model_weights.ckpt"), &weights[..weights.len() / 2]).unwrap();
        },
        "model_weights.ckpt: zip",
    );
    refused(
        "ckpt-mcore.nemo",
        |folder| {
            std::fs::copy("tests/data/torch/hostile-system.pt", folder.join("model_weights.ckpt")).unwrap();
        },
        "system",
    );
    refused(
        "ckpt-mcore.nemo",
        |folder| {
            std::fs::remove_file(folder.join("model_weights.ckpt")).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", folder.join("model_weights.ckpt")).unwrap();
        },
        "no weights",
    );
}

#[test]
fn survives_damage() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.nemo");
    for name in fixtures() {
        let good = std::fs::read(fixture(&name)).unwrap();
        for _ in 0..60 {
            let mut bytes = good.clone();
            for _ in 0..1 + random() % 8 {
                let at = random() % bytes.len();
                bytes[at] = random() as u8;
            }
            if random() % 4 == 0 {
                bytes.truncate(random() % bytes.len());
            }
            std::fs::write(&path, &bytes).unwrap();
            match Checkpoint::open(&path) {
                Ok(checkpoint) => {
                    checkpoint.tensors().for_each(|view| assert_eq!(data(&view).len() as u64, view.bytes()))
                }
                Err(error) => assert!(error.to_string().contains("x.nemo"), "{name}: {error}"),
            }
        }
    }
}
