use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::testing::*;
use super::*;
use crate::tensor::DType;

const BF16: DType = DType::BF16;

/// A valid single-file checkpoint in a fresh folder.
fn single() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &tiny_config(), BF16, 1);
    folder
}

/// A valid checkpoint of three shards in a fresh folder.
fn sharded() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_sharded(folder.path(), &tiny_config(), BF16, 1, 3);
    folder
}

/// The tiny config's tensors after `change`, as a checkpoint.
fn with_tensors(config: &Value, change: impl FnOnce(&mut Vec<Tensor>)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), config, BF16, 1);
    let mut tensors = random_tensors(&model_config(config), BF16, 1);
    change(&mut tensors);
    fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    folder
}

/// Rewrites the index's weight map.
fn change_index(folder: &TempDir, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = folder.path().join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(index["weight_map"].as_object_mut().unwrap());
    fs::write(&path, index.to_string()).unwrap();
}

/// The message of failing to open `folder`; it names the folder or a file in it.
fn refusal(folder: &TempDir) -> String {
    let message = Checkpoint::open(folder.path()).expect_err("opened").to_string();
    assert!(message.contains(&folder.path().display().to_string()), "{message}");
    message
}

#[track_caller]
fn assert_refused(folder: &TempDir, reason: &str) {
    let message = refusal(folder);
    assert!(message.contains(reason), "{message}");
}

fn tied_config() -> Value {
    let mut config = tiny_config();
    config["tie_word_embeddings"] = true.into();
    config
}

#[test]
fn opens_a_folder_with_one_file() {
    let folder = single();
    assert!(is_checkpoint(folder.path()));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.path(), checkpoint.format()), (folder.path(), "hugging-face"));
    assert_eq!(*checkpoint.config(), model_config(&tiny_config()));

    let written = random_tensors(checkpoint.config(), BF16, 1);
    assert_eq!(checkpoint.tensors().count(), written.len());
    for (view, (name, _, shape, data)) in checkpoint.tensors().zip(&written) {
        assert_eq!((view.name, view.dtype, view.shape), (name.as_str(), BF16, &shape[..]));
        assert_eq!(checkpoint.tensor(name).unwrap().raw(0..view.elements()), data.as_slice());
    }
    assert_eq!(checkpoint.weight_bytes(), written.iter().map(|tensor| tensor.3.len() as u64).sum::<u64>());
    assert_eq!(checkpoint.weight_bytes() as usize, 2 * checkpoint.config().parameters().unwrap());
    let message = checkpoint.tensor("model.layers.2.mlp.up_proj.weight").unwrap_err().to_string();
    assert!(message.contains("no tensor `model.layers.2.mlp.up_proj.weight`"), "{message}");
}

#[test]
fn follows_links_to_the_files() {
    // A hub cache is a folder of links.
    let (blobs, folder) = (single(), tempfile::tempdir().unwrap());
    for name in ["config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(blobs.path().join(name), folder.path().join(name)).unwrap();
    }
    assert!(Checkpoint::open(folder.path()).is_ok());
    fs::remove_file(blobs.path().join("model.safetensors")).unwrap();
    assert_refused(&folder, "cannot open");
}

#[test]
fn names_tensors_in_the_order_of_use() {
    let folder = single();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<&str> = checkpoint.tensors().map(|view| view.name).collect();
    assert_eq!(
        names[..3],
        ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.bias"]
    );
    assert_eq!(names[names.len() - 3..], ["model.norm.weight", "model.norm.bias", "lm_head.weight"]);
    assert_eq!(names.len(), 2 * 10 + 4);
    assert_eq!(checkpoint.tensor("model.layers.1.self_attn.k_proj.weight").unwrap().shape, [8, 6]);
    assert_eq!(checkpoint.tensor("model.layers.1.self_attn.o_proj.weight").unwrap().shape, [6, 16]);
}

#[test]
fn opens_shards_with_the_same_content() {
    let (one, many) = (single(), sharded());
    let (one, many) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(many.path()).unwrap());
    for (left, right) in one.tensors().zip(many.tensors()) {
        let data = |view: TensorView<'_>| view.raw(0..view.elements()).into_owned();
        assert_eq!((left.name, left.shape, data(left)), (right.name, right.shape, data(right)));
    }
    assert_eq!(one.weight_bytes(), many.weight_bytes());
}

#[test]
fn one_file_is_read_before_shards() {
    let folder = sharded();
    write_checkpoint(folder.path(), &tiny_config(), DType::F32, 2);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.tensors().all(|view| view.dtype == DType::F32));
}

#[test]
fn every_tensor_may_have_its_own_float_dtype() {
    let folder = with_tensors(&tiny_config(), |tensors| {
        let floats = random_tensors(&model_config(&tiny_config()), DType::F32, 1);
        let halves = random_tensors(&model_config(&tiny_config()), DType::F16, 1);
        (tensors[1], tensors[2]) = (floats[1].clone(), halves[2].clone());
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let dtypes: Vec<DType> = checkpoint.tensors().take(4).map(|view| view.dtype).collect();
    assert_eq!(dtypes, [BF16, DType::F32, DType::F16, BF16]);
}

#[test]
fn an_undeclared_dtype_is_the_embeddings() {
    let mut config = tiny_config();
    config.as_object_mut().unwrap().remove("dtype");
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &config, DType::F16, 1);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().config().dtype, DType::F16);
}

#[test]
fn a_tied_head_is_absent_or_the_same() {
    let folder = with_tensors(&tied_config(), |_| {});
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.tensors().last().unwrap().name, "model.norm.bias");
    let message = checkpoint.tensor("lm_head.weight").unwrap_err().to_string();
    assert!(message.contains("is tied to the embedding: use `model.embed_tokens.weight`"), "{message}");

    let head_like = |tensors: &mut Vec<Tensor>, first_byte: u8| {
        let mut head = tensors[0].clone();
        head.0 = "lm_head.weight".into();
        head.3[0] ^= first_byte;
        tensors.push(head);
    };
    let folder = with_tensors(&tied_config(), |tensors| head_like(tensors, 0));
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().last().unwrap().name, "model.norm.bias");
    let folder = with_tensors(&tied_config(), |tensors| head_like(tensors, 1));
    assert_refused(&folder, "both are stored and differ; set tie_word_embeddings to false");
    let folder = with_tensors(&tiny_config(), |tensors| drop(tensors.pop()));
    assert_refused(&folder, "`lm_head.weight` [13, 6] is missing");
}

#[test]
fn computed_buffers_are_ignored() {
    let buffer: Tensor = ("model.layers.0.self_attn.rotary_emb.inv_freq".into(), "F32", vec![1], vec![0; 4]);
    let folder = with_tensors(&tiny_config(), |tensors| tensors.push(buffer.clone()));
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().count(), 24);
    // In a shard, listed or not.
    let folder = sharded();
    let config = model_config(&tiny_config());
    let mut tensors: Vec<Tensor> = random_tensors(&config, BF16, 1).into_iter().step_by(3).collect();
    tensors.push(buffer.clone());
    fs::write(folder.path().join(shard_name(0, 3)), safetensors(&tensors)).unwrap();
    assert!(Checkpoint::open(folder.path()).is_ok());
    change_index(&folder, |map| drop(map.insert(buffer.0.clone(), shard_name(0, 3).into())));
    assert!(Checkpoint::open(folder.path()).is_ok());
}

#[test]
fn refuses_tensors_that_are_not_the_models() {
    let folder = with_tensors(&tiny_config(), |tensors| drop(tensors.remove(3)));
    assert_refused(&folder, "do not match config.json: `model.layers.0.self_attn.q_proj.weight` [16, 6] is missing");

    let bias: Tensor = ("model.layers.0.self_attn.q_proj.bias".into(), "BF16", vec![16], vec![0; 32]);
    let folder = with_tensors(&tiny_config(), |tensors| tensors.push(bias));
    assert_refused(&folder, "`model.layers.0.self_attn.q_proj.bias` (BF16 [16]) is not a tensor of this model");

    let folder = with_tensors(&tiny_config(), |tensors| tensors[3].2.reverse());
    assert_refused(&folder, "`model.layers.0.self_attn.q_proj.weight` has shape [6, 16], expected [16, 6]");

    let folder = with_tensors(&tiny_config(), |tensors| tensors[3].1 = "I16");
    assert_refused(&folder, "`model.layers.0.self_attn.q_proj.weight` is stored as I16, expected F32, F16 or BF16");

    let folder = with_tensors(&tiny_config(), |tensors| tensors.truncate(1));
    let message = refusal(&folder);
    assert!(message.ends_with("; and 18 more"), "{message}");
    assert_eq!(message.matches("is missing").count(), 5);
}

#[test]
fn refuses_weights_that_config_does_not_describe() {
    for (key, value) in [("num_hidden_layers", 3), ("num_hidden_layers", 1), ("hidden_size", 7), ("vocab_size", 14)] {
        let folder = single();
        let mut config = tiny_config();
        config[key] = value.into();
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        assert_refused(&folder, "do not match config.json");
    }
}

#[test]
fn refuses_a_name_in_two_shards() {
    let folder = sharded();
    let tensors: Vec<Tensor> = random_tensors(&model_config(&tiny_config()), BF16, 1);
    let mut second: Vec<Tensor> = tensors.iter().skip(1).step_by(3).cloned().collect();
    second.push(tensors[0].clone());
    fs::write(folder.path().join(shard_name(1, 3)), safetensors(&second)).unwrap();
    assert_refused(
        &folder,
        "model-00002-of-00003.safetensors: contains tensor `model.embed_tokens.weight`, which model.safetensors.index.json \
         assigns to `model-00001-of-00003.safetensors`",
    );
}

#[test]
fn refuses_an_index_that_shards_contradict() {
    let embedding = "model.embed_tokens.weight";
    let folder = sharded();
    change_index(&folder, |map| drop(map.insert(embedding.into(), shard_name(1, 3).into())));
    assert_refused(&folder, "contains tensor `model.embed_tokens.weight`, which");

    let folder = sharded();
    change_index(&folder, |map| drop(map.insert("more".into(), shard_name(1, 3).into())));
    assert_refused(&folder, "lacks 1 tensor(s) that model.safetensors.index.json assigns to it, such as `more`");

    let folder = sharded();
    change_index(&folder, |map| drop(map.swap_remove(embedding)));
    assert_refused(
        &folder,
        "contains tensor `model.embed_tokens.weight`, which model.safetensors.index.json does not list",
    );

    let folder = sharded();
    change_index(&folder, |map| map.retain(|_, shard| *shard != shard_name(2, 3)));
    assert_refused(&folder, "do not match config.json");

    let folder = sharded();
    fs::remove_file(folder.path().join(shard_name(1, 3))).unwrap();
    assert_refused(&folder, "cannot open");
}

#[test]
fn refuses_shards_outside_the_folder() {
    for shard in [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "./x.safetensors",
        "..",
        "",
        ".",
        "x.bin",
        "x.safetensors/",
    ] {
        let folder = sharded();
        change_index(&folder, |map| drop(map.insert("model.norm.bias".into(), shard.into())));
        let reason = format!("`{shard}` is not the name of a .safetensors file in the same folder");
        assert_refused(&folder, &reason);
    }
    let folder = sharded();
    change_index(&folder, |map| drop(map.insert("model.norm.bias".into(), 7.into())));
    assert_refused(&folder, "tensor `model.norm.bias`: 7 is a number, expected a file name");
    change_index(&folder, |map| drop(map.insert("model.norm.bias".into(), "nul\u{0}.safetensors".into())));
    refusal(&folder);
}

#[test]
fn refuses_an_index_without_a_map() {
    for (text, reason) in [
        ("{}", "the key weight_map is missing or not an object"),
        (r#"{"weight_map": []}"#, "the key weight_map is missing or not an object"),
        (r#"{"weight_map": {}}"#, "do not match config.json"),
        (r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#, "duplicate key `a`"),
        ("[", "not valid JSON"),
    ] {
        let folder = sharded();
        fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        assert_refused(&folder, reason);
    }
}

#[test]
fn refuses_what_is_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert!(!is_checkpoint(folder.path()));
    assert_refused(&folder, "config.json");
    fs::write(folder.path().join("config.json"), tiny_config().to_string()).unwrap();
    assert!(!is_checkpoint(folder.path()));
    assert_refused(&folder, "found neither model.safetensors nor model.safetensors.index.json");
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert_refused(&folder, "save_pretrained");
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert_refused(&folder, "not a regular file");

    let message = Checkpoint::open(&folder.path().join("config.json")).unwrap_err().to_string();
    assert!(message.contains("neither a folder"), "{message}");
    let message = Checkpoint::open(&folder.path().join("absent")).unwrap_err().to_string();
    assert!(message.contains("cannot open"), "{message}");

    let folder = single();
    fs::write(folder.path().join("config.json"), vec![b' '; 2 << 20]).unwrap();
    assert_refused(&folder, "longer than 1048576 bytes");
}

#[test]
fn finds_the_files_beside_the_weights() {
    let folder = single();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.tokenizer_file(100).unwrap().is_none());
    assert_eq!(checkpoint.generation_config().unwrap(), GenerationConfig::default());

    for (name, is_json) in [("tokenizer.model", false), ("tokenizer.json", true)] {
        fs::write(folder.path().join(name), name).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let found = checkpoint.tokenizer_file(100).unwrap().unwrap();
        assert_eq!((found.path, found.is_json), (folder.path().join(name), is_json));
        assert_eq!(found.bytes, name.as_bytes());
        let message = checkpoint.tokenizer_file(13).unwrap_err().to_string();
        assert!(message.contains("tokenizer.") && message.contains("more than the limit of 13"), "{message}");
    }
    let path = folder.path().join("generation_config.json");
    fs::write(&path, json!({"eos_token_id": [3, 4], "temperature": 0.5}).to_string()).unwrap();
    let generation = checkpoint.generation_config().unwrap();
    assert_eq!((generation.eos_token_ids, generation.temperature), (vec![3, 4], Some(0.5)));
    fs::write(&path, json!({"eos_token_id": 13}).to_string()).unwrap();
    let message = checkpoint.generation_config().unwrap_err().to_string();
    assert!(message.contains("generation_config.json: eos_token_id 13"), "{message}");
}

#[test]
fn opens_the_shipped_shapes() {
    let shapes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/shapes");
    for (name, dtype, rotary_dim, theta, tied) in [
        ("odd", DType::F32, 6, 10_000.0, false),
        ("gqa", BF16, 6, 10_000.0, false),
        ("theta", DType::F16, 12, 500_000.0, false),
        ("wide", BF16, 8, 10_000.0, true),
    ] {
        let checkpoint = Checkpoint::open(&shapes.join(name)).unwrap();
        let config = checkpoint.config();
        assert_eq!((config.dtype, config.rotary_dim, config.rope_theta), (dtype, rotary_dim, theta), "{name}");
        assert_eq!(config.tie_word_embeddings, tied, "{name}");
        assert_eq!(checkpoint.weight_bytes() as usize, config.parameters().unwrap() * dtype.bytes(), "{name}");
        assert_eq!(checkpoint.generation_config().unwrap().eos_token_ids, [3], "{name}");
        for view in checkpoint.tensors() {
            let mut values = vec![0.0; view.elements()];
            view.read_f32(0, &mut values);
            assert!(
                values.iter().all(|value| value.is_finite()) && values.iter().any(|value| *value != 0.0),
                "{}",
                view.name
            );
        }
        let golden = crate::tensor_file::TensorFile::open(&shapes.join(name).join("golden.safetensors")).unwrap();
        assert_eq!(golden.tensor("logits.2").unwrap().0.shape, [40, config.vocab_size], "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens to the bytes of any file, opening gives a checkpoint of the same shape or an error that names
    /// the folder.
    #[test]
    fn survives_damage(
        file in 0usize..5,
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..5),
        cut in prop::option::of(any::<usize>()),
    ) {
        let folder = sharded();
        let names = ["config.json", "model.safetensors.index.json"].map(String::from);
        let name = names.get(file).cloned().unwrap_or_else(|| shard_name(file.saturating_sub(2), 3));
        let path = folder.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        // Past the header, changed bytes are only other weights: aim at the front.
        let front = bytes.len().min(1200);
        for (at, value) in changes {
            bytes[at % front] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut % (bytes.len() + 1));
        }
        fs::write(&path, bytes).unwrap();
        match Checkpoint::open(folder.path()) {
            Ok(checkpoint) => {
                for view in checkpoint.tensors() {
                    prop_assert_eq!(view.raw(0..view.elements()).len() as u64, view.bytes());
                }
            }
            Err(error) => {
                let (message, path) = (error.to_string(), folder.path().display().to_string());
                prop_assert!(message.contains(&path), "{}", message);
                prop_assert!(message.len() > path.len() + 10);
            }
        }
    }
}
