//! Hostile and broken inputs, through the real program: each gives a clear error that names the thing, a non-zero
//! exit code, no panic, and little memory. (A process of its own: Linux counts the parent's peak memory as the child's.)

mod archives;
mod packages;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aotron::checkpoint::tar::{Archive, MemberKind};
use aotron::compile::Precision;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wait4::Wait4;

use crate::archives::Tar;
use crate::packages::build_package;

/// Memory limit of every refusal.
const MAX_BYTES: u64 = 100 << 20;

/// A fresh folder, with helpers to break its contents.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        Scene { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A copy of a good checkpoint.
    fn checkpoint(&self, shape: &str) -> PathBuf {
        let copy = self.path("checkpoint");
        copy_folder(&Path::new("tests/data/shapes").join(shape), &copy);
        copy
    }

    /// A good package.
    fn package(&self) -> PathBuf {
        self.package_in(Precision::Bf16)
    }

    fn package_in(&self, precision: Precision) -> PathBuf {
        let path = self.path("engine");
        build_package(Path::new("tests/data/shapes/gqa"), precision, &path);
        path
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, serde_json::to_vec_pretty(&value).unwrap()).unwrap();
}

fn edit_bytes(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Rewrites the header of a safetensors file, keeping its data.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    edit_bytes(path, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        edit(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header);
        out.extend_from_slice(&bytes[8 + length..]);
        *bytes = out;
    });
}

/// Changes a package's manifest and recomputes its digest, as an attacker would.
fn edit_manifest(package: &Path, edit: impl FnOnce(&mut Value)) {
    let path = package.join("engine.json");
    edit_json(&path, |manifest| {
        edit(manifest);
        manifest["sha256"] = json!("");
    });
    let text = format!("{}\n", fs::read_to_string(&path).unwrap());
    let digest: String = Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
    fs::write(&path, text.replace("\"sha256\": \"\"", &format!("\"sha256\": \"{digest}\""))).unwrap();
}

/// Changes a package's plan, and updates its manifest entry so that the digest does not reveal the change.
fn edit_plan(package: &Path, edit: impl FnOnce(&mut Value)) {
    let plan = package.join("plans/cpu.json");
    edit_json(&plan, edit);
    let bytes = fs::read(&plan).unwrap();
    let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    edit_manifest(package, |manifest| {
        for file in manifest["files"].as_array_mut().unwrap() {
            if file["path"] == "plans/cpu.json" {
                file["sha256"] = json!(digest);
                file["bytes"] = json!(bytes.len());
            }
        }
    });
}

/// A field of a plan's first linear layer with scales.
fn first_quantized<'p>(plan: &'p mut Value, field: &str) -> &'p mut Value {
    let kernels = plan["kernels"].as_array_mut().unwrap();
    let linear =
        kernels.iter_mut().find_map(|kernel| kernel.get_mut("linear").filter(|linear| !linear["scales"].is_null()));
    &mut linear.unwrap()[field]
}

/// Runs the program, which must refuse with a message that contains all of `expected`.
fn refused(arguments: &[&str], expected: &[&str]) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let mut message = Vec::new();
    std::io::Read::read_to_end(&mut stderr, &mut message).unwrap();
    let used = child.wait4().unwrap();
    let message = String::from_utf8_lossy(&message);
    let case = arguments.join(" ");
    assert!(!used.status.success(), "`{case}` was accepted");
    assert!(used.status.code().is_some(), "`{case}` died of a signal: {message}");
    assert!(!message.contains("panicked"), "`{case}` panicked: {message}");
    for part in expected {
        assert!(message.contains(part), "`{case}` does not say {part:?}: {message}");
    }
    assert!(message.len() < 4000, "`{case}` says too much: {message}");
    let most = MAX_BYTES.max(own_peak_bytes());
    assert!(used.rusage.maxrss <= most, "`{case}` took {} bytes", used.rusage.maxrss);
}

/// Linux reports this process's own peak memory as its child's unless the child exceeds it.
fn own_peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn build_refused(scene: &Scene, checkpoint: &Path, expected: &[&str]) {
    let output = scene.path("out");
    refused(&["build", text(checkpoint), "--recipe", "cpu", "-o", text(&output)], expected);
    assert!(!output.exists(), "a refused build left {}", output.display());
    let left: Vec<_> = fs::read_dir(scene.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains("building")), "{left:?}");
}

fn run_refused(package: &Path, more: &[&str], expected: &[&str]) {
    let mut arguments = vec!["run", text(package), "--token-ids", "1,2,3", "--max-tokens", "1"];
    arguments.extend(more);
    refused(&arguments, expected);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// One test per case, so that a failure names it.
macro_rules! cases {
    ($($name:ident: |$scene:ident| $body:block)*) => { $(
        #[test]
        fn $name() {
            let $scene = &Scene::new();
            $body
        }
    )* };
}

/// A checkpoint whose config has one key set to a value.
macro_rules! config_cases {
    ($($name:ident: $key:literal = $value:tt, says $expected:expr;)*) => { cases! { $(
        $name: |scene| {
            let checkpoint = scene.checkpoint("odd");
            edit_json(&checkpoint.join("config.json"), |c| c[$key] = json!($value));
            build_refused(scene, &checkpoint, &$expected);
        }
    )* } };
}

config_cases! {
    config_gelu: "hidden_act" = "gelu", says ["config.json", "hidden_act", "gelu", "relu2"];
    config_rope_type: "rope_parameters" = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, says ["llama3"];
    config_attention_bias: "attention_bias" = true, says ["attention_bias"];
    config_quantized: "quantization_config" = {"bits": 4}, says ["quantization_config"];
    config_unknown_key: "attention_multiplier" = 2.0, says ["attention_multiplier"];
    config_huge_vocab: "vocab_size" = 4611686018427387904u64, says ["vocab_size"];
    config_zero_layers: "num_hidden_layers" = 0, says ["num_layers is 0"];
    config_heads_do_not_divide: "num_key_value_heads" = 7, says ["config.json", "7"];
    config_eps_negative: "norm_eps" = (-1.0), says ["eps"];
}

/// Name and content of the files of a good `.nemo`.
type Members = Vec<(String, Vec<u8>)>;

fn members(name: &str) -> Members {
    let path = Path::new("tests/data/nemo").join(name);
    let bytes = fs::read(&path).unwrap();
    let archive = Archive::read(&path, &bytes).unwrap();
    let files = archive.members().iter().filter(|member| member.kind == MemberKind::File);
    files.map(|member| (member.name.clone(), bytes[member.bytes.clone()].to_vec())).collect()
}

fn member<'m>(members: &'m mut Members, name: &str) -> &'m mut Vec<u8> {
    &mut members.iter_mut().find(|(other, _)| other == name).unwrap_or_else(|| panic!("{name}")).1
}

/// A `.nemo` of changed members must be refused.
fn nemo_refused(scene: &Scene, name: &str, edit: impl FnOnce(&mut Members), expected: &[&str]) {
    let mut members = members(name);
    edit(&mut members);
    let mut tar = Tar::default();
    for (name, data) in &members {
        tar.file(&format!("./{name}"), data);
    }
    archive_refused(scene, &tar.finish(), expected);
}

fn archive_refused(scene: &Scene, bytes: &[u8], expected: &[&str]) {
    let path = scene.path("model.nemo");
    fs::write(&path, bytes).unwrap();
    build_refused(scene, &path, &[&["model.nemo"], expected].concat());
    refused(&["inspect", text(&path)], expected);
}

fn replace_text(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = String::from_utf8(bytes.clone()).unwrap();
    assert!(text.contains(from), "{text}");
    *bytes = text.replacen(from, to, 1).into_bytes();
}

/// A `.nemo` whose config has one line changed.
macro_rules! yaml_cases {
    ($($name:ident: $from:literal to $to:literal, says $expected:expr;)*) => { cases! { $(
        $name: |scene| {
            let edit = |members: &mut Members| replace_text(member(members, "model_config.yaml"), $from, $to);
            nemo_refused(scene, "zarr.nemo", edit, &$expected);
        }
    )* } };
}

yaml_cases! {
    nemo_gelu: "activation: squared-relu" to "activation: gelu", says ["model_config.yaml", "activation", "gelu"];
    nemo_bias: "bias: false" to "bias: true", says ["bias", "true"];
    nemo_norm: "normalization: layernorm1p" to "normalization: rmsnorm", says ["normalization", "rmsnorm"];
    nemo_positions: "position_embedding_type: rope" to "position_embedding_type: alibi", says ["alibi"];
    nemo_alias: "bias: false" to "bias: &a false\ndata: *a", says ["model_config.yaml"];
    nemo_layers: "num_layers: 4" to "num_layers: 4000000000", says ["num_layers"];
}

const CHUNK: &str = "model_weights/model.decoder.layers.mlp.linear_fc1.weight/1.0.0";
const ARRAY: &str = "model_weights/model.decoder.layers.mlp.linear_fc1.weight/.zarray";

cases! {
    nemo_name_leads_out: |scene| {
        archive_refused(scene, &Tar::default().file("../../etc/x", b"x").finish(), &["escapes the archive"]);
    }
    nemo_name_is_absolute: |scene| {
        archive_refused(scene, &Tar::default().file("/etc/x", b"x").finish(), &["absolute path"]);
    }
    nemo_config_is_a_link: |scene| {
        let bytes = Tar::default().entry("./model_config.yaml", b'2', "/etc/passwd", 0, b"").finish();
        archive_refused(scene, &bytes, &["model_config.yaml", "a symbolic link"]);
    }
    nemo_weights_are_a_link: |scene| {
        let mut tar = Tar::default();
        tar.file("model_config.yaml", member(&mut members("ckpt-mcore.nemo"), "model_config.yaml"));
        tar.entry("model_weights.ckpt", b'1', "model_config.yaml", 0, b"");
        archive_refused(scene, &tar.finish(), &["no weights"]);
    }
    nemo_is_sparse: |scene| {
        let bytes = Tar::default().entry("./model_weights.ckpt", b'S', "", 1 << 30, &[0; 512]).finish();
        archive_refused(scene, &bytes, &["model_weights.ckpt"]);
        let bytes = Tar::default().entry("./model_weights.ckpt", b'S', "", 512, &[0; 512]).finish();
        archive_refused(scene, &bytes, &["sparse"]);
    }
    nemo_size_is_a_lie: |scene| {
        let bytes = Tar::default().entry("./model_weights.ckpt", b'0', "", 1 << 32, &[0; 512]).finish();
        archive_refused(scene, &bytes, &["4294967296 bytes", "truncated"]);
    }
    nemo_is_truncated: |scene| {
        let bytes = fs::read("tests/data/nemo/zarr.nemo").unwrap();
        archive_refused(scene, &bytes[..bytes.len() / 2], &["truncated"]);
    }
    nemo_is_no_archive: |scene| {
        archive_refused(scene, &[b'x'; 5000], &["tar"]);
        archive_refused(scene, b"", &["tar"]);
    }
    nemo_member_twice: |scene| {
        nemo_refused(scene, "zarr.nemo", |m| { let again = m[0].clone(); m.push(again); }, &["duplicate member"]);
    }
    nemo_gzip_bomb: |scene| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        let tar = Tar::default().entry("./model_weights.ckpt", b'0', "", 1 << 32, b"").finish();
        encoder.write_all(&tar[..512]).unwrap();
        for _ in 0..300 {
            encoder.write_all(&[0; 1 << 20]).unwrap();
        }
        archive_refused(scene, &encoder.finish().unwrap(), &["decompression bomb"]);
    }
    nemo_gzip_is_truncated: |scene| {
        let bytes = fs::read("tests/data/nemo/ckpt-gzip.nemo").unwrap();
        archive_refused(scene, &bytes[..bytes.len() - 5], &["gzip"]);
        archive_refused(scene, &bytes[..3], &["gzip"]);
    }
    nemo_pickle_runs_a_program: |scene| {
        for (file, name) in [("hostile-system.pt", "system"), ("hostile-eval.pt", "eval")] {
            let hostile = fs::read(Path::new("tests/data/torch").join(file)).unwrap();
            let edit = |members: &mut Members| *member(members, "model_weights.ckpt") = hostile;
            nemo_refused(scene, "ckpt-mcore.nemo", edit, &["model_weights.ckpt", name, "nothing was executed"]);
        }
    }
    nemo_metadata_runs_a_program: |scene| {
        let hostile = fs::read("tests/data/torch_dist/hostile.metadata").unwrap();
        let edit = |members: &mut Members| *member(members, "model_weights/.metadata") = hostile;
        nemo_refused(scene, "torch-dist.nemo", edit, &[".metadata", "nothing was executed"]);
    }
    nemo_chunk_is_missing: |scene| {
        nemo_refused(scene, "zarr.nemo", |m| m.retain(|(name, _)| name != CHUNK), &["linear_fc1.weight", "1.0.0"]);
    }
    nemo_chunk_is_short: |scene| {
        nemo_refused(scene, "zarr.nemo", |m| { member(m, CHUNK).pop(); }, &["1.0.0", "bytes"]);
    }
    nemo_chunks_overlap: |scene| {
        let edit = |members: &mut Members| {
            let chunk = member(members, CHUNK).clone();
            members.push((CHUNK.replace("1.0.0", "01.0.0"), chunk));
        };
        nemo_refused(scene, "zarr.nemo", edit, &["01.0.0"]);
    }
    nemo_chunks_are_of_no_size: |scene| {
        let edit = |members: &mut Members| {
            let mut array: Value = serde_json::from_slice(member(members, ARRAY)).unwrap();
            array["chunks"] = json!([0, 1, 1]);
            *member(members, ARRAY) = array.to_string().into_bytes();
        };
        nemo_refused(scene, "zarr.nemo", edit, &[".zarray", "chunks"]);
    }
    nemo_array_is_compressed: |scene| {
        let edit = |members: &mut Members| {
            let mut array: Value = serde_json::from_slice(member(members, ARRAY)).unwrap();
            array["compressor"] = json!({"id": "blosc"});
            *member(members, ARRAY) = array.to_string().into_bytes();
        };
        nemo_refused(scene, "zarr.nemo", edit, &[".zarray", "compressor", "blosc"]);
    }
    nemo_weight_is_not_finite: |scene| {
        let mut members = members("zarr.nemo");
        member(&mut members, CHUNK)[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        let mut tar = Tar::default();
        members.iter().for_each(|(name, data)| { tar.file(name, data); });
        fs::write(scene.path("model.nemo"), tar.finish()).unwrap();
        build_refused(scene, &scene.path("model.nemo"), &["model.layers.1.mlp.up_proj.weight", "NaN", "row 0, column 0"]);
    }
    nemo_has_more_than_the_model: |scene| {
        let edit = |members: &mut Members| {
            for name in [".zarray", "0", "0.0"] {
                let from = format!("model_weights/model.decoder.final_layernorm.weight/{name}");
                if let Some((_, data)) = members.iter().find(|(other, _)| *other == from).cloned() {
                    members.push((format!("model_weights/model.rm_head.weight/{name}"), data));
                }
            }
        };
        nemo_refused(scene, "zarr.nemo", edit, &["model.rm_head.weight", "not a tensor of this model"]);
    }
    nemo_tokenizer_is_missing: |scene| {
        nemo_refused(scene, "zarr.nemo", |m| m.retain(|(name, _)| !name.ends_with(".model")), &["_tokenizer.model", "is missing"]);
    }
}

cases! {
    no_such_checkpoint: |scene| {
        build_refused(scene, &scene.path("nowhere"), &["nowhere"]);
    }
    checkpoint_is_empty: |scene| {
        fs::create_dir(scene.path("empty")).unwrap();
        build_refused(scene, &scene.path("empty"), &["config.json"]);
    }
    config_truncated: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_bytes(&checkpoint.join("config.json"), |b| b.truncate(b.len() / 2));
        build_refused(scene, &checkpoint, &["config.json"]);
    }
    config_is_binary: |scene| {
        let checkpoint = scene.checkpoint("odd");
        fs::write(checkpoint.join("config.json"), [0xff, 0x00, 0x80, 0x7f].repeat(1000)).unwrap();
        build_refused(scene, &checkpoint, &["config.json"]);
    }
    config_nests_deep: |scene| {
        let checkpoint = scene.checkpoint("odd");
        fs::write(checkpoint.join("config.json"), "[".repeat(500_000)).unwrap();
        build_refused(scene, &checkpoint, &["config.json"]);
    }
    weights_missing: |scene| {
        let checkpoint = scene.checkpoint("odd");
        fs::remove_file(checkpoint.join("model.safetensors")).unwrap();
        build_refused(scene, &checkpoint, &["model.safetensors"]);
    }
    weights_empty: |scene| {
        let checkpoint = scene.checkpoint("odd");
        fs::write(checkpoint.join("model.safetensors"), []).unwrap();
        build_refused(scene, &checkpoint, &["model.safetensors"]);
    }
    weights_header_is_huge: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_bytes(&checkpoint.join("model.safetensors"), |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
        build_refused(scene, &checkpoint, &["model.safetensors", "header"]);
    }
    weights_header_truncated: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_bytes(&checkpoint.join("model.safetensors"), |b| b.truncate(100));
        build_refused(scene, &checkpoint, &["model.safetensors", "truncated"]);
    }
    weights_data_truncated: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_bytes(&checkpoint.join("model.safetensors"), |b| b.truncate(b.len() - 1));
        build_refused(scene, &checkpoint, &["model.safetensors", "truncated"]);
    }
    weights_overlap: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| {
            let other = h["model.layers.0.mlp.up_proj.weight"]["data_offsets"].clone();
            h["model.layers.1.mlp.up_proj.weight"]["data_offsets"] = other;
        });
        build_refused(scene, &checkpoint, &["model.safetensors", "mlp.up_proj"]);
    }
    weights_shape_overflows: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| {
            h["lm_head.weight"]["shape"] = json!([u64::MAX / 2, 8]);
        });
        build_refused(scene, &checkpoint, &["lm_head.weight"]);
    }
    weights_offsets_past_the_end: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| {
            h["lm_head.weight"]["data_offsets"] = json!([0, u64::MAX]);
        });
        build_refused(scene, &checkpoint, &["lm_head.weight"]);
    }
    tensor_missing: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| {
            let norm = h.as_object_mut().unwrap().remove("model.norm.bias").unwrap();
            h["model.norm.bias_"] = norm;
        });
        build_refused(scene, &checkpoint, &["model.norm.bias"]);
    }
    tensor_transposed: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| {
            let shape = &mut h["model.layers.0.mlp.up_proj.weight"]["shape"];
            shape.as_array_mut().unwrap().reverse();
        });
        build_refused(scene, &checkpoint, &["model.layers.0.mlp.up_proj.weight", "expected"]);
    }
    tensor_of_integers: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_header(&checkpoint.join("model.safetensors"), |h| h["lm_head.weight"]["dtype"] = json!("I32"));
        build_refused(scene, &checkpoint, &["lm_head.weight", "I32"]);
    }
    tensor_has_nan: |scene| {
        let checkpoint = scene.checkpoint("odd");
        edit_bytes(&checkpoint.join("model.safetensors"), |b| {
            let end = b.len();
            b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        });
        build_refused(scene, &checkpoint, &["NaN", "row"]);
    }
    shard_missing: |scene| {
        let checkpoint = scene.checkpoint("gqa");
        fs::remove_file(checkpoint.join("model-00002-of-00002.safetensors")).unwrap();
        build_refused(scene, &checkpoint, &["model-00002-of-00002.safetensors"]);
    }
    shard_outside_the_folder: |scene| {
        let checkpoint = scene.checkpoint("gqa");
        edit_json(&checkpoint.join("model.safetensors.index.json"), |i| {
            i["weight_map"]["lm_head.weight"] = json!("../../etc/model.safetensors");
        });
        build_refused(scene, &checkpoint, &["../../etc/model.safetensors"]);
    }
    tokenizer_is_garbage: |scene| {
        let checkpoint = scene.checkpoint("odd");
        fs::write(checkpoint.join("tokenizer.json"), "{\"model\": 7}").unwrap();
        build_refused(scene, &checkpoint, &["tokenizer.json"]);
    }
    tokenizer_model_is_garbage: |scene| {
        let checkpoint = scene.checkpoint("odd");
        let model = checkpoint.join("tokenizer.model");
        for (bytes, word) in [
            (&b"\x0a\xff\xff\xff\xff\x0f"[..], "piece 0"),
            (b"{}", "not a SentencePiece model"),
            (b"", "no pieces"),
            (&b"\x0a\x00".repeat(2 << 20), "at most 1048576 pieces"),
        ] {
            fs::write(&model, bytes).unwrap();
            build_refused(scene, &checkpoint, &["tokenizer.model", word]);
        }
    }
    tokenizer_makes_its_reader_panic: |scene| {
        let checkpoint = scene.checkpoint("odd");
        let model = json!({"type": "BPE", "continuing_subword_prefix": "####",
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]});
        let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": model});
        fs::write(checkpoint.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        build_refused(scene, &checkpoint, &["tokenizer.json", "contradicts itself"]);
    }
    recipe_has_an_unknown_key: |scene| {
        let recipe = scene.path("recipe.toml");
        fs::write(&recipe, format!("{}\nturbo = true\n", include_str!("../engines/cpu.toml"))).unwrap();
        let output = scene.path("out");
        let checkpoint = "tests/data/shapes/odd";
        refused(&["build", checkpoint, "--recipe", text(&recipe), "-o", text(&output)], &["turbo"]);
    }
    recipe_does_not_exist: |scene| {
        let output = scene.path("out");
        let arguments = ["build", "tests/data/shapes/odd", "--recipe", "tpu", "-o", text(&output)];
        refused(&arguments, &["tpu", "cpu"]);
    }
    output_is_someone_elses: |scene| {
        fs::write(scene.path("precious"), "data").unwrap();
        let folder = text(scene.folder.path());
        let arguments = ["build", "tests/data/shapes/odd", "--recipe", "cpu", "--force", "-o", folder];
        refused(&arguments, &["not an engine package"]);
        assert_eq!(fs::read_to_string(scene.path("precious")).unwrap(), "data");
    }

    no_such_package: |scene| {
        run_refused(&scene.path("nowhere"), &[], &["nowhere", "aotron build"]);
    }
    package_without_manifest: |scene| {
        run_refused(scene.folder.path(), &[], &["engine.json"]);
    }
    package_of_a_newer_format: |scene| {
        let package = scene.package();
        edit_manifest(&package, |m| m["format_version"] = json!(4));
        run_refused(&package, &[], &["format version 4", "reads version 3", "newer aotron"]);
    }
    package_of_an_older_format: |scene| {
        let package = scene.package();
        edit_manifest(&package, |m| m["format_version"] = json!(2));
        run_refused(&package, &[], &["format version 2", "reads version 3; build the package again"]);
    }
    manifest_truncated: |scene| {
        let package = scene.package();
        edit_bytes(&package.join("engine.json"), |b| b.truncate(b.len() - 20));
        run_refused(&package, &[], &["engine.json"]);
    }
    manifest_changed: |scene| {
        let package = scene.package();
        edit_json(&package.join("engine.json"), |m| m["generation"]["max_tokens"] = json!(7));
        run_refused(&package, &[], &["engine.json", "digest"]);
    }
    manifest_of_an_impossible_model: |scene| {
        let package = scene.package();
        edit_manifest(&package, |m| m["model"]["num_layers"] = json!(1_000_000_000_000_u64));
        run_refused(&package, &[], &["engine.json: model", "num_layers"]);
    }
    manifest_of_a_hostile_chat_format: |scene| {
        let package = scene.package();
        let jinja = |source: &str| json!({"kind": "jinja", "name": "x", "source": source});
        let named: serde_json::Map<String, Value> = (100..200).map(|n| (n.to_string(), json!("a"))).collect();
        for (key, value, reason) in [
            ("stop_strings", json!(vec!["x".to_owned(); 100_000]), "100000 stop strings; at most 64"),
            ("stop_strings", json!([""]), "a stop string of 0 bytes"),
            ("stop_strings", json!(["x".repeat(2000)]), "a stop string of 2000 bytes"),
            ("eos_token_ids", json!([4_000_000_000_u32]), "stop id 4000000000; the last id is"),
            ("end_of_turn", json!({"text": "", "id": null}), "a stop string of 0 bytes"),
            ("named_templates", json!(named), "100 named templates; at most 64"),
            ("special_tokens", json!({"bos_token": "x".repeat(5000)}), "5000 bytes in the name of a token"),
            ("template", jinja("{% for %}"), "the template cannot be read: line 1"),
            ("template", jinja(&"x".repeat((1 << 20) + 1)), "1048577 bytes"),
        ] {
            let before = fs::read(package.join("engine.json")).unwrap();
            edit_manifest(&package, |m| m["chat_format"][key] = value);
            run_refused(&package, &[], &["engine.json: chat_format: ", reason]);
            fs::write(package.join("engine.json"), before).unwrap();
        }
    }
    manifest_of_another_model: |scene| {
        let package = scene.package();
        let before = fs::read(package.join("engine.json")).unwrap();
        let edits: [(fn(&mut Value), &str); 6] = [
            (|m| m["model"]["num_layers"] = json!(1), "layers, but the manifest's num_layers is 1"),
            (|m| m["model"]["vocab_size"] = json!(1_000_000), "but the manifest's vocab_size is 1000000"),
            (|m| m["model"]["max_position_embeddings"] = json!(8), "the manifest's max_position_embeddings is 8"),
            (|m| m["plans"][0]["kv_bytes_per_token"] = json!(0), "the manifest's kv_bytes_per_token is 0"),
            (
                |m| m["tokenizer"] = json!({"file": "plans/cpu.json", "source": "x", "vocab_size": 1_u64 << 40}),
                "the tokenizer has 1099511627776 ids",
            ),
            (
                |m| {
                    let plan = m["plans"][0].clone();
                    m["plans"].as_array_mut().unwrap().push(plan);
                },
                "two plans for the target cpu",
            ),
        ];
        for (edit, reason) in edits {
            edit_manifest(&package, edit);
            run_refused(&package, &[], &[reason]);
            fs::write(package.join("engine.json"), &before).unwrap();
        }
    }
    manifest_names_a_file_outside: |scene| {
        let package = scene.package();
        edit_manifest(&package, |m| m["files"][0]["path"] = json!("../../secret"));
        run_refused(&package, &[], &["../../secret"]);
    }
    plan_damaged: |scene| {
        let package = scene.package();
        edit_bytes(&package.join("plans/cpu.json"), |b| b[40] ^= 1);
        run_refused(&package, &[], &["plans/cpu.json", "damaged"]);
    }
    plan_writes_outside_the_arena: |scene| {
        let package = scene.package();
        edit_plan(&package, |p| p["buffers"][0]["offset"] = json!(1u64 << 40));
        run_refused(&package, &[], &["plans/cpu.json", "arena"]);
    }
    plan_names_a_weight_that_is_not_there: |scene| {
        let package = scene.package();
        edit_plan(&package, |p| p["weights"][0]["rows"] = json!(1_000_000_007));
        run_refused(&package, &[], &["weights/cpu-bf16.safetensors", "the plan expects"]);
    }
    plan_wants_a_huge_arena: |scene| {
        let package = scene.package();
        edit_plan(&package, |p| p["arena_bytes"] = json!(u64::MAX / 4));
        run_refused(&package, &[], &["cannot reserve"]);
    }
    quantized_plan_in_blocks_of_nothing: |scene| {
        let package = scene.package_in(Precision::Int4);
        edit_plan(&package, |p| *first_quantized(p, "group") = json!(0));
        run_refused(&package, &[], &["plans/cpu.json", "groups of 0"]);
    }
    quantized_plan_in_odd_blocks: |scene| {
        let package = scene.package_in(Precision::Int4);
        edit_plan(&package, |p| *first_quantized(p, "group") = json!(3));
        run_refused(&package, &[], &["plans/cpu.json", "groups of 3"]);
    }
    quantized_plan_in_other_blocks: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| *first_quantized(p, "group") = json!(2));
        run_refused(&package, &[], &["plans/cpu.json", "scales of"]);
    }
    quantized_plan_takes_floats_for_codes: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| {
            let scales = first_quantized(p, "scales").clone();
            *first_quantized(p, "weight") = scales;
        });
        run_refused(&package, &[], &["plans/cpu.json", "is not packed for a linear kernel"]);
    }
    quantized_embedding: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| {
            for weight in p["weights"].as_array_mut().unwrap() {
                if weight["storage"] == "row_major" {
                    weight["dtype"] = json!("i8");
                }
            }
        });
        run_refused(&package, &[], &["plans/cpu.json", "i8"]);
    }
    plan_packed_as_nothing_known: |scene| {
        let package = scene.package();
        edit_plan(&package, |p| {
            for weight in p["weights"].as_array_mut().unwrap() {
                if let Some(packed) = weight["storage"].get_mut("packed") {
                    packed["packing"] = json!("amx-tiles");
                }
            }
        });
        run_refused(&package, &[], &["plans/cpu.json", "`amx-tiles`", "--finish --recipe cpu"]);
    }
    plan_packed_for_other_activations: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| {
            for weight in p["weights"].as_array_mut().unwrap() {
                if let Some(packed) = weight["storage"].get_mut("packed").filter(|packed| packed["packing"] == "i8-codes") {
                    packed["packing"] = json!("int8-quads");
                }
            }
        });
        run_refused(&package, &[], &["plans/cpu.json", "is not packed for", "in bf16"]);
    }
    plan_with_scales_where_there_are_none: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| *first_quantized(p, "scales") = json!(null));
        run_refused(&package, &[], &["plans/cpu.json", "with the scales that its packing has"]);
    }
    plan_quantizes_into_what_it_reads: |scene| {
        let package = scene.package_in(Precision::Int8);
        edit_plan(&package, |p| {
            let x = first_quantized(p, "x").clone();
            p["kernels"].as_array_mut().unwrap().push(json!({"quantize": {"x": x, "out": x["buffer"], "scales": x["buffer"]}}));
        });
        run_refused(&package, &[], &["plans/cpu.json", "expected i8"]);
    }
    weights_file_truncated: |scene| {
        let package = scene.package();
        edit_bytes(&package.join("weights/cpu-bf16.safetensors"), |b| b.truncate(b.len() - 64));
        run_refused(&package, &[], &["weights/cpu-bf16.safetensors", "bytes"]);
    }
    weights_file_missing: |scene| {
        let package = scene.package();
        fs::remove_file(package.join("weights/cpu-bf16.safetensors")).unwrap();
        run_refused(&package, &[], &["weights/cpu-bf16.safetensors", "missing"]);
    }
    weights_file_damaged: |scene| {
        let package = scene.package();
        edit_bytes(&package.join("weights/cpu-bf16.safetensors"), |b| {
            let end = b.len();
            b[end - 1] ^= 0x40;
        });
        run_refused(&package, &["--verify"], &["weights/cpu-bf16.safetensors", "damaged"]);
    }

    prompt_too_long: |scene| {
        let package = scene.package();
        let ids = vec!["5"; 5000].join(",");
        refused(&["run", text(&package), "--token-ids", &ids], &["5000 tokens", "at most"]);
    }
    token_id_outside_the_vocabulary: |scene| {
        let package = scene.package();
        refused(&["run", text(&package), "--token-ids", "1,4000000000"], &["4000000000"]);
    }
    temperature_is_nan: |scene| {
        let package = scene.package();
        run_refused(&package, &["--temperature", "nan"], &["temperature"]);
    }
    text_without_a_tokenizer: |scene| {
        let package = scene.package();
        refused(&["run", text(&package), "--prompt", "hello"], &["tokenizer", "--token-ids"]);
    }
    ids_file_is_garbage: |scene| {
        let package = scene.package();
        fs::write(scene.path("ids.json"), "[[1, 2], \"three\"]").unwrap();
        refused(&["score", text(&package), "--ids", text(&scene.path("ids.json"))], &["ids.json"]);
    }
    prompt_file_is_not_utf8: |scene| {
        let package = scene.package();
        fs::write(scene.path("prompt.txt"), [0xff, 0xfe, 0x00]).unwrap();
        refused(&["run", text(&package), "--prompt-file", text(&scene.path("prompt.txt"))], &["prompt.txt"]);
    }
}
