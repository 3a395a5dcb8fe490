//! Schemas of what the server reads or writes as JSON without a type of its own. They are only described, never built.
#![allow(dead_code, reason = "fields of a description")]

use serde_json::Value;
use utoipa::ToSchema;

/// A message of a conversation. A model whose chat format is a Jinja template may know more roles and fields.
#[derive(ToSchema)]
pub struct InputMessage {
    /// `system`, `developer` (the same), `user` or `assistant`.
    role: String,
    content: Content,
}

/// A string, or parts of text that are joined.
#[derive(serde::Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a text.
#[derive(serde::Deserialize, ToSchema)]
pub struct ContentPart {
    r#type: ContentType,
    text: String,
}

/// The type of a part.
#[derive(serde::Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContentType {
    Text,
    InputText,
    OutputText,
}

/// The stop string or token id that ended an answer.
#[derive(serde::Deserialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    Id(u32),
    Text(String),
}

/// Why an answer ended: its own end or a stop, its limit of tokens, or the end of the server.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
    Abort,
}

/// Log-probabilities of tokens; all lists have one entry for each token.
#[derive(ToSchema)]
pub struct CompletionLogprobs {
    tokens: Vec<String>,
    /// Null for the first token of a prompt.
    token_logprobs: Vec<Option<f64>>,
    /// Log-probabilities by text, of the alternatives and the token itself.
    top_logprobs: Vec<Option<std::collections::HashMap<String, f64>>>,
    /// Places of the tokens in the text, in characters.
    text_offset: Vec<usize>,
}

/// The models of the server.
#[derive(ToSchema)]
pub struct ModelList {
    /// `list`
    object: String,
    data: Vec<ModelDescription>,
}

/// A model.
#[derive(ToSchema)]
pub struct ModelDescription {
    id: String,
    /// `model`
    object: String,
    /// Seconds since 1970.
    created: u64,
    /// `aotron`
    owned_by: String,
    /// Tokens of a prompt and its answer together; absent until the model is open.
    #[schema(required = false, nullable = false)]
    max_model_len: Option<usize>,
    /// There if it could not be opened: an object with `value`, which is `failed`, and `reason`.
    #[schema(required = false, nullable = false, value_type = Option<Object>)]
    status: Option<serde_json::Value>,
}

/// The state of the server and its models.
#[derive(ToSchema)]
pub struct Readiness {
    ready: bool,
    /// The server is stopping.
    draining: bool,
    models: Vec<ModelState>,
}

/// The state of a model.
#[derive(ToSchema)]
pub struct ModelState {
    name: String,
    state: ModelStateName,
}

/// Whether a model answers.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ModelStateName {
    Ready,
    Failed,
    Loading,
}

/// The program.
#[derive(ToSchema)]
pub struct Version {
    version: String,
    /// `aotron`
    name: String,
}

/// A response.
#[derive(ToSchema)]
pub struct ResponsesReply {
    id: String,
    /// `response`
    object: String,
    /// Seconds since 1970.
    created_at: u64,
    status: ResponseStatus,
    model: String,
    output: Vec<ResponseMessage>,
    error: Option<ResponseError>,
    incomplete_details: Option<IncompleteDetails>,
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    usage: Option<ResponseUsage>,
    text: Value,
    metadata: Value,
}

/// The state of a response or of a message in it.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum ResponseStatus {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

/// The answer.
#[derive(ToSchema)]
pub struct ResponseMessage {
    /// `message`
    r#type: String,
    id: String,
    status: ResponseStatus,
    /// `assistant`
    role: String,
    content: Vec<ResponsePart>,
}

/// A text of an answer.
#[derive(ToSchema)]
pub struct ResponsePart {
    /// `output_text`
    r#type: String,
    text: String,
    annotations: Vec<Value>,
    logprobs: Vec<Value>,
}

/// Why a response has failed.
#[derive(ToSchema)]
pub struct ResponseError {
    code: String,
    message: String,
}

/// Why a response is incomplete.
#[derive(ToSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`
    reason: String,
}

/// Tokens of a response.
#[derive(ToSchema)]
pub struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: InputTokensDetails,
    output_tokens: usize,
    output_tokens_details: OutputTokensDetails,
    total_tokens: usize,
}

/// Tokens of a prompt.
#[derive(ToSchema)]
pub struct InputTokensDetails {
    /// Prompt tokens whose keys and values were in the KV cache.
    cached_tokens: usize,
}

/// Tokens of an answer.
#[derive(ToSchema)]
pub struct OutputTokensDetails {
    /// 0: the model does not reason apart.
    reasoning_tokens: usize,
}

/// An event of a stream, whose name is also that of the SSE event: `response.created`, `response.in_progress`,
/// `response.output_item.added`, `response.content_part.added`, `response.output_text.delta` with the next piece of the
/// text in `delta`, then the same with `done`, and last `response.completed`, `response.incomplete` or `response.failed`.
#[derive(ToSchema)]
pub struct ResponsesEvent {
    r#type: String,
    /// Counts the events from 0.
    sequence_number: u64,
    #[schema(required = false, nullable = false)]
    delta: Option<String>,
    #[schema(required = false, nullable = false)]
    response: Option<ResponsesReply>,
}

/// A message of the model.
#[derive(ToSchema)]
pub struct AnthropicMessage {
    id: String,
    /// `message`
    r#type: String,
    /// `assistant`
    role: String,
    model: String,
    content: Vec<AnthropicBlock>,
    stop_reason: AnthropicStop,
    /// The string of `stop_sequences` that ended the answer.
    stop_sequence: Option<String>,
    usage: AnthropicUsage,
}

/// A block of text.
#[derive(ToSchema)]
pub struct AnthropicBlock {
    /// `text`
    r#type: String,
    text: String,
}

/// Why an answer ended.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum AnthropicStop {
    EndTurn,
    MaxTokens,
    StopSequence,
}

/// Tokens of a request.
#[derive(ToSchema)]
pub struct AnthropicUsage {
    /// Prompt tokens that were computed.
    input_tokens: usize,
    /// Prompt tokens whose keys and values were in the KV cache.
    cache_read_input_tokens: usize,
    /// 0: the cache costs nothing to write.
    cache_creation_input_tokens: usize,
    output_tokens: usize,
}

/// An event of a stream, whose name is its `type`: `message_start`, `content_block_start`, `ping`,
/// `content_block_delta` with the next piece of the text in `delta.text`, `content_block_stop`, `message_delta` with
/// `stop_reason` and `usage`, and `message_stop`; or `error`.
#[derive(ToSchema)]
pub struct AnthropicEvent {
    r#type: String,
    #[schema(required = false, nullable = false)]
    index: Option<usize>,
    #[schema(value_type = Object, required = false)]
    delta: Option<Value>,
    #[schema(value_type = Object, required = false)]
    message: Option<Value>,
    #[schema(value_type = Object, required = false)]
    usage: Option<Value>,
}

/// The length of a prompt.
#[derive(ToSchema)]
pub struct TokenCount {
    input_tokens: usize,
}

/// Token ids.
#[derive(ToSchema)]
pub struct TokenizeReply {
    count: usize,
    /// Tokens of a prompt and its answer together.
    max_model_len: usize,
    tokens: Vec<EncodedToken>,
    /// Null without `return_token_strs`.
    token_strs: Option<Vec<String>>,
}

/// A token id or, with `with_pieces`, an object.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum EncodedToken {
    Id(u32),
    Piece { id: u32, piece: String },
}

/// A text.
#[derive(ToSchema)]
pub struct DetokenizeReply {
    prompt: String,
    /// The same.
    content: String,
}

/// The server.
#[derive(ToSchema)]
pub struct KserveServer {
    /// `aotron`
    name: String,
    version: String,
    extensions: Vec<String>,
}

/// A name of a model.
#[derive(ToSchema)]
pub struct RepositoryEntry {
    name: String,
    /// `1`
    version: String,
    /// `READY`, `LOADING`, or `UNAVAILABLE` if it could not be opened
    state: String,
    /// Why it could not be opened; otherwise empty.
    reason: String,
}

/// The inputs and outputs of a model.
#[derive(ToSchema)]
pub struct KserveModel {
    /// The name that was asked for.
    name: String,
    versions: Vec<String>,
    platform: String,
    inputs: Vec<KserveTensor>,
    outputs: Vec<KserveTensor>,
}

/// An input or output.
#[derive(ToSchema)]
pub struct KserveTensor {
    name: String,
    datatype: Datatype,
    /// -1 is any.
    shape: Vec<i64>,
}

/// Type of the elements of a tensor. BYTES are strings; as bytes, each is preceded by its length as a 32-bit number.
#[derive(ToSchema)]
#[schema(rename_all = "UPPERCASE")]
pub enum Datatype {
    Bytes,
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Fp16,
    Fp32,
    Fp64,
}

/// The model in the form of Triton's configuration.
#[derive(ToSchema)]
pub struct KserveConfig {
    name: String,
    platform: String,
    backend: String,
    max_batch_size: usize,
    input: Vec<Value>,
    output: Vec<Value>,
    #[schema(value_type = Object)]
    model_transaction_policy: Value,
    #[schema(value_type = Object)]
    parameters: Value,
}

/// The answers.
#[derive(ToSchema)]
pub struct InferReply {
    /// That of the request, if it had one.
    #[schema(required = false, nullable = false)]
    id: Option<String>,
    model_name: String,
    /// `1`
    model_version: String,
    outputs: Vec<InferOutput>,
}

/// An output, `[prompts, 1]`.
#[derive(ToSchema)]
pub struct InferOutput {
    /// `outputs` or `sentences`
    name: String,
    /// `BYTES`
    datatype: String,
    shape: Vec<usize>,
    /// The answers, unless they follow as bytes.
    #[schema(required = false, nullable = false)]
    data: Option<Vec<String>>,
    /// `binary_data_size`, if they do.
    #[schema(value_type = Object, required = false)]
    parameters: Option<Value>,
}

/// An answer, or a piece of one.
#[derive(ToSchema)]
pub struct GenerateReply {
    model_name: String,
    /// `1`
    model_version: String,
    text_output: String,
}

/// An error in OpenAI's form.
#[derive(ToSchema)]
pub struct OpenAiError {
    error: OpenAiErrorBody,
}

/// What is wrong.
#[derive(ToSchema)]
pub struct OpenAiErrorBody {
    message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error`, `timeout_error`,
    /// `service_unavailable_error` or `server_error`
    r#type: String,
    /// The field concerned.
    param: Option<String>,
    /// `model_not_found`, `invalid_api_key`, `context_length_exceeded`, `unsupported_parameter` or `queue_full`
    code: Option<String>,
}

/// An error in Anthropic's form.
#[derive(ToSchema)]
pub struct AnthropicErrorReply {
    /// `error`
    r#type: String,
    error: AnthropicErrorBody,
}

/// What is wrong.
#[derive(ToSchema)]
pub struct AnthropicErrorBody {
    /// `invalid_request_error`, `authentication_error`, `not_found_error`, `request_too_large`, `rate_limit_error`,
    /// `overloaded_error`, `timeout_error` or `api_error`
    r#type: String,
    message: String,
}

/// An error in KServe's form.
#[derive(ToSchema)]
pub struct KserveErrorReply {
    error: String,
}
