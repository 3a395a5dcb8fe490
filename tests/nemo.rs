//! Packages built from `.nemo` files equal those built from a Hugging Face folder with the same weights.

use std::path::Path;

use aotron::compile::Precision;
use aotron::engine::Package;
use aotron::tensor_file::TensorFile;
use aotron::text::Message;
use serde_json::{Value, json};

use crate::archives::Tar;
use crate::packages::build_package;

/// Digests of a package's weights and plans, by name.
fn digests(package: &Package) -> Vec<(String, String)> {
    let files = package.manifest().files.iter().filter(|file| !file.path.starts_with("tokenizer"));
    files.map(|file| (file.path.clone(), file.sha256.clone())).collect()
}

#[test]
fn files_of_the_real_writers_become_the_same_package() {
    let folder = tempfile::tempdir().unwrap();
    for precision in [Precision::Bf16, Precision::Int8, Precision::Int4, Precision::F32] {
        let reference =
            build_package(Path::new("tests/data/nemo/hf"), precision, &folder.path().join(precision.to_string()));
        let mut compared = 0;
        for entry in std::fs::read_dir("tests/data/nemo").unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if !name.ends_with(".nemo") || name.contains("padded") {
                continue;
            }
            let package = build_package(&path, precision, &folder.path().join(format!("{precision}-{name}")));
            assert_eq!(digests(&package), digests(&reference), "{name} in {precision}");
            assert_eq!(package.manifest().model, reference.manifest().model, "{name}");
            assert_eq!(package.manifest().generation, reference.manifest().generation, "{name}");
            compared += 1;
        }
        assert!(compared >= 16, "{compared}");
    }
}

/// Rows that only pad the vocabulary hold large random numbers in these files: if one were ever chosen, it would show.
#[test]
fn padding_of_the_vocabulary_is_never_sampled() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["ckpt-tp4-padded.nemo", "zarr-tp4-padded.nemo"] {
        let output = folder.path().join(name);
        let package = build_package(&Path::new("tests/data/nemo").join(name), Precision::F32, &output);
        let (rows, ids) = (package.manifest().model.vocab_size, package.tokenizer().unwrap().unwrap().vocab_size());
        assert_eq!((rows, ids), (128, 112));
        for seed in 0..20 {
            let ran = std::process::Command::new(env!("CARGO_BIN_EXE_aotron"))
                .args([
                    "run",
                    output.to_str().unwrap(),
                    "--token-ids",
                    "7,8,9",
                    "--max-tokens",
                    "40",
                    "--format",
                    "json",
                ])
                .args(["--temperature", "5", "--min-tokens", "40", "--seed", &seed.to_string()])
                .output()
                .unwrap();
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            let answer: Value = serde_json::from_slice(&ran.stdout).unwrap();
            let sampled = answer["token_ids"].as_array().unwrap();
            assert!(sampled.iter().all(|id| id.as_u64().unwrap() < 112), "{answer}");
        }
    }
}

/// Weights and plan equal those of the Hugging Face folder, and every prompt of the 500 conversations has the same ids,
/// hence every answer is the same.
#[test]
fn tiny_chat_as_a_nemo_is_tiny_chat() {
    let folder = tempfile::tempdir().unwrap();
    let reference = build_package(Path::new("tests/data/tiny-chat"), Precision::Bf16, &folder.path().join("hf"));
    for ranks in [1, 2] {
        let path = folder.path().join(format!("tp{ranks}.nemo"));
        std::fs::write(&path, tiny_chat_nemo(ranks)).unwrap();
        let package = build_package(&path, Precision::Bf16, &folder.path().join(format!("engine-{ranks}")));
        assert_eq!(digests(&package), digests(&reference), "{ranks} ranks");
        let format = package.chat_format();
        let expected = reference.chat_format();
        assert_eq!((&format.template, format.stop_ids()), (&expected.template, expected.stop_ids()));
        assert_eq!(format.chat_stop_strings(), expected.chat_stop_strings());
        let tokenizer = package.tokenizer().unwrap().unwrap();
        let lines = |file: &str| -> Vec<Value> {
            let text = std::fs::read_to_string(Path::new("tests/data/tiny-chat").join(file)).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        };
        let mut prompts = 0;
        for (asked, answered) in lines("conversations.jsonl").iter().zip(&lines("answers.jsonl")) {
            let mut messages = vec![Message::system(asked["system"].as_str().unwrap())];
            for (asked, answered) in
                asked["turns"].as_array().unwrap().iter().zip(answered["turns"].as_array().unwrap())
            {
                messages.push(Message::user(asked["user"].as_str().unwrap()));
                let ids = format.prompt(&tokenizer, &messages).unwrap();
                assert_eq!(json!(ids), answered["prompt_ids"], "{messages:?}");
                messages.push(Message::assistant(answered["text"].as_str().unwrap()));
                prompts += 1;
            }
        }
        assert!(prompts > 700, "{prompts}");
    }
}

const ARTIFACT: &str = "0123456789abcdef0123456789abcdef_tokenizer.model";

/// tiny-chat as NeMo stores it after training on `ranks` tensor-parallel ranks: layers stacked, queries, keys and
/// values fused, and one zarr chunk per rank and layer.
fn tiny_chat_nemo(ranks: usize) -> Vec<u8> {
    let folder = Path::new("tests/data/tiny-chat");
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (layers, hidden, heads) = (size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads"));
    let (groups, head_dim, ffn) = (size("num_key_value_heads"), size("head_dim"), size("intermediate_size"));
    let yaml = format!(
        "num_layers: {layers}\nhidden_size: {hidden}\nffn_hidden_size: {ffn}\nnum_attention_heads: {heads}\n\
         num_query_groups: {groups}\nkv_channels: {head_dim}\nmax_position_embeddings: {}\n\
         normalization: layernorm1p\nlayernorm_epsilon: 1.0e-05\nactivation: squared-relu\nbias: false\n\
         position_embedding_type: rope\nrotary_percentage: {}\nshare_embeddings_and_output_weights: false\n\
         mcore_gpt: true\nprecision: bf16\ntokenizer:\n  library: sentencepiece\n  model: nemo:{ARTIFACT}\n",
        size("max_position_embeddings"),
        config["rope_parameters"]["partial_rotary_factor"]
    );
    let weights = TensorFile::open(&folder.join("model.safetensors")).unwrap();
    let matrix = |name: &str| weights.tensor(name).unwrap_or_else(|| panic!("{name}")).1.to_vec();
    let layer = |index: usize, name: &str| matrix(&format!("model.layers.{index}.{name}.weight"));

    let mut tar = Tar::default();
    tar.file("./model_config.yaml", yaml.as_bytes());
    tar.file(&format!("./{ARTIFACT}"), &std::fs::read(folder.join("tokenizer.model")).unwrap());
    tar.file("./model_weights/metadata.json", br#"{"sharded_backend": "zarr", "sharded_backend_version": 1}"#);
    tar.file("./model_weights/common.pt", b"not read");
    let row = 2 * hidden;
    let fused = |index: usize| {
        let parts = ["q_proj", "k_proj", "v_proj"].map(|part| layer(index, &format!("self_attn.{part}")));
        let of_group = |part: &[u8], group: usize| {
            let bytes = part.len() / groups;
            part[group * bytes..(group + 1) * bytes].to_vec()
        };
        (0..groups).flat_map(|group| parts.each_ref().map(|part| of_group(part, group)).concat()).collect::<Vec<u8>>()
    };
    let qkv_rows = (heads + 2 * groups) * head_dim;
    let mut stacked = |name: &str, shape: [usize; 2], axis: Option<usize>, of_layer: &dyn Fn(usize) -> Vec<u8>| {
        let all: Vec<Vec<u8>> = (0..layers).map(of_layer).collect();
        array(&mut tar, &format!("model.decoder.layers.{name}"), &shape, Some(&all), axis, ranks);
    };
    stacked("self_attention.linear_qkv.weight", [qkv_rows, hidden], Some(0), &fused);
    stacked("self_attention.linear_proj.weight", [hidden, heads * head_dim], Some(1), &|i| {
        layer(i, "self_attn.o_proj")
    });
    stacked("mlp.linear_fc1.weight", [ffn, hidden], Some(0), &|i| layer(i, "mlp.up_proj"));
    stacked("mlp.linear_fc2.weight", [hidden, ffn], Some(1), &|i| layer(i, "mlp.down_proj"));
    for (to, from) in [
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
        ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm"),
    ] {
        for part in ["weight", "bias"] {
            let vector = |i: usize| matrix(&format!("model.layers.{i}.{from}.{part}"));
            stacked(&format!("{to}{part}"), [1, hidden], None, &vector);
        }
    }
    for part in ["weight", "bias"] {
        let vector = vec![matrix(&format!("model.norm.{part}"))];
        array(&mut tar, &format!("model.decoder.final_layernorm.{part}"), &[1, hidden], Some(&vector), None, ranks);
    }
    for (to, from) in [
        ("model.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("model.output_layer.weight", "lm_head.weight"),
    ] {
        let data = matrix(from);
        let shape = [data.len() / row, hidden];
        array(&mut tar, to, &shape, Some(&[data]), Some(0), ranks);
    }
    tar.finish()
}

/// Adds an array of stacked layers, `[layers, rows, columns]`, without the layer axis for a single tensor outside the
/// layers. A matrix of one row is a vector.
fn array(tar: &mut Tar, name: &str, shape: &[usize; 2], layers: Option<&[Vec<u8>]>, axis: Option<usize>, ranks: usize) {
    let layers = layers.unwrap_or_default();
    let [rows, columns] = *shape;
    let is_stacked = name.contains(".layers.");
    let mut chunk = [rows, columns];
    if let Some(axis) = axis {
        assert!(chunk[axis].is_multiple_of(ranks), "{name}");
        chunk[axis] /= ranks;
    }
    let dims = |sizes: [usize; 2]| if rows == 1 { sizes[1..].to_vec() } else { sizes.to_vec() };
    let stack = |count: usize, sizes: [usize; 2]| {
        if is_stacked { [vec![count], dims(sizes)].concat() } else { dims(sizes) }
    };
    let zarray = json!({
        "chunks": stack(1, chunk), "compressor": null, "dtype": "bfloat16", "fill_value": null, "filters": null,
        "order": "C", "shape": stack(layers.len(), *shape), "zarr_format": 2
    });
    tar.file(&format!("./model_weights/{name}/.zarray"), zarray.to_string().as_bytes());
    for (layer, data) in layers.iter().enumerate() {
        for (i, j) in (0..rows / chunk[0]).flat_map(|i| (0..columns / chunk[1]).map(move |j| (i, j))) {
            let of_row = |row: usize| {
                let start = 2 * (row * columns + j * chunk[1]);
                data[start..start + 2 * chunk[1]].to_vec()
            };
            let part: Vec<u8> = (i * chunk[0]..(i + 1) * chunk[0]).flat_map(of_row).collect();
            let index: Vec<String> = stack(layer, [i, j]).iter().map(usize::to_string).collect();
            tar.file(&format!("./model_weights/{name}/{}", index.join(".")), &part);
        }
    }
}
