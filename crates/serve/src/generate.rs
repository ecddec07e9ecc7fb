//! From tokens to text: detokenizing, stop strings, and the times between.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use tokio::time::Sleep;
use tracing::Span;
use updraft_chat::{Chat, Detokenizer, StopMatcher, Stopped};

use crate::app::{App, Phase};
use crate::engine::{FinishReason, GenerateRequest, TokenEvent, TokenLogprobs, TokenStream, Usage};
use crate::error::{Error, Result};
use crate::metrics::{ModelMetrics, Times};

/// A request whose answer is text.
#[derive(Debug, Clone)]
pub(crate) struct TextRequest {
    pub(crate) request: GenerateRequest,
    /// Strings that end the completion.
    pub(crate) stop: Vec<String>,
    /// Whether the stop string that was found stays in the text.
    pub(crate) include_stop: bool,
    /// Whether control tokens leave no text.
    pub(crate) skip_special_tokens: bool,
}

impl TextRequest {
    /// The same request as the `index`-th of several choices: only its draws differ.
    pub(crate) fn for_choice(&self, index: u32) -> Self {
        let mut request = self.clone();
        let sampling = &mut request.request.sampling;
        sampling.seed = sampling.seed.wrapping_add(u64::from(index));
        request
    }

    fn split(self) -> (GenerateRequest, TextForm) {
        let stops = StopMatcher::new(self.stop);
        let form = TextForm {
            min_tokens: self.request.min_tokens,
            stops: match self.include_stop {
                true => stops.including_stop(),
                false => stops,
            },
            skip_special_tokens: self.skip_special_tokens,
        };
        (self.request, form)
    }
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) logprobs: Option<TokenLogprobs>,
}

impl Token {
    pub(crate) fn ids(tokens: &[Self]) -> Vec<u32> {
        tokens.iter().map(|token| token.id).collect()
    }
}

/// What happens to one completion.
#[derive(Debug)]
pub(crate) enum TextEvent {
    /// The prompt's log-probabilities.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// The prompt's hidden state.
    Embedding(Vec<f32>),
    /// Whole characters, and the tokens that begin in them. Either may be empty. What the request
    /// cost until then.
    Text {
        text: String,
        tokens: Vec<Token>,
        usage: Usage,
    },
    /// The end; `stopped` says which stop string was found.
    Finished {
        reason: FinishReason,
        usage: Usage,
        stopped: Option<usize>,
    },
}

/// The text of one completion as it comes; dropping it cancels the request.
pub(crate) type TextStream = BoxStream<'static, Result<TextEvent>>;

/// Admits the completions of one request, all at once or none, and turns their tokens into text.
pub(crate) async fn start(
    app: &App,
    chat: &Arc<Chat>,
    texts: Vec<TextRequest>,
    arrived: Instant,
) -> Result<Vec<TextStream>> {
    let Some(model) = texts.first().map(|text| text.request.model.clone()) else {
        return Ok(Vec::new());
    };
    let (requests, forms): (Vec<_>, Vec<_>) = texts.into_iter().map(TextRequest::split).unzip();
    let lengths: Vec<usize> = requests
        .iter()
        .map(|request| request.prompt_ids.len())
        .collect();
    let admitted = app.engine.generate_all(requests).await;
    let admitted = admitted.inspect_err(|error| {
        if matches!(error, Error::Overloaded { .. }) {
            app.metrics.of(&model).rejected();
        }
    })?;
    let metrics = app.metrics.of(&model);
    let completion = |((tokens, form), prompt_tokens)| {
        let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let completion = Completion::new(app, chat, form, tokens, prompt_tokens, arrived, &metrics);
        stream::try_unfold(completion, Completion::next).boxed()
    };
    let admitted = admitted.into_iter().zip(forms).zip(lengths);
    Ok(admitted.map(completion).collect())
}

/// What a [`TextRequest`] says besides what the engine is asked.
struct TextForm {
    min_tokens: u32,
    stops: StopMatcher,
    skip_special_tokens: bool,
}

struct Completion {
    metrics: Arc<ModelMetrics>,
    /// Ends when the request may take no longer.
    timeout: Option<Pin<Box<Sleep>>>,
    tokens: TokenStream,
    stopping: BoxFuture<'static, ()>,
    detokenizer: Detokenizer,
    /// Tokens in whose text no stop string ends.
    min_tokens: u32,
    stops: StopMatcher,
    pending: Pending,
    usage: Usage,
    /// Events that are due before the next token is awaited.
    ready: VecDeque<TextEvent>,
    done: bool,
    times: Times,
    /// The request's; a stream is told after its handler has ended.
    span: Span,
}

impl Completion {
    fn new(
        app: &App,
        chat: &Chat,
        form: TextForm,
        tokens: TokenStream,
        prompt_tokens: u32,
        arrived: Instant,
        metrics: &Arc<ModelMetrics>,
    ) -> Self {
        let detokenizer = Detokenizer::new(chat.tokenizer().clone());
        let timeout = app.options.request_timeout;
        Self {
            tokens,
            stopping: app.entered(Phase::Stopping).boxed(),
            detokenizer: match form.skip_special_tokens {
                true => detokenizer,
                false => detokenizer.with_special_tokens(),
            },
            min_tokens: form.min_tokens,
            stops: form.stops,
            pending: Pending::default(),
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            ready: VecDeque::new(),
            done: false,
            span: Span::current(),
            times: Times {
                arrived,
                started: None,
                first_token: None,
                last_token: None,
            },
            metrics: metrics.clone(),
            timeout: timeout
                .map(|timeout| Box::pin(tokio::time::sleep_until((arrived + timeout).into()))),
        }
    }

    async fn next(mut self) -> Result<Option<(TextEvent, Self)>> {
        while self.ready.is_empty() && !self.done {
            let event = tokio::select! {
                event = self.tokens.try_next() => event?,
                () = &mut self.stopping => None,
                () = elapsed(&mut self.timeout) => return Err(Error::Timeout),
            };
            match event {
                Some(TokenEvent::Started { cached_tokens }) => {
                    self.usage.cached_tokens = cached_tokens;
                    self.times.started = Some(Instant::now());
                    let prompt_tokens = self.usage.prompt_tokens;
                    self.metrics.started(prompt_tokens, &self.times);
                }
                Some(TokenEvent::Embedding(state)) => {
                    self.ready.push_back(TextEvent::Embedding(state));
                }
                Some(TokenEvent::Prompt(logprobs)) => {
                    self.ready.push_back(TextEvent::Prompt(logprobs));
                }
                Some(TokenEvent::Token { id, logprobs }) => self.token(Token { id, logprobs }),
                Some(TokenEvent::Finished { reason, usage }) => self.flush(reason, usage),
                None => {
                    return Err(Error::Unavailable {
                        reason: "the server is shutting down",
                    });
                }
            }
        }
        Ok(self.ready.pop_front().map(|event| (event, self)))
    }

    fn token(&mut self, token: Token) {
        self.time_token();
        self.usage.completion_tokens += 1;
        self.metrics.generated(1);
        let is_early = self.is_early();
        let text = self.detokenizer.push(token.id);
        self.pending.push(token, text.len());
        let (text, stopped) = look(&mut self.stops, text, is_early);
        let tokens = self.pending.release(text.len());
        self.tell(text, tokens);
        if let Some(stopped) = stopped {
            self.finish(FinishReason::Stop, Some(stopped.index));
        }
    }

    /// The engine is done: what was held back comes out, unless it completes a stop string.
    fn flush(&mut self, mut reason: FinishReason, usage: Usage) {
        let is_early = self.is_early();
        let (mut text, stopped) = look(&mut self.stops, self.detokenizer.finish(), is_early);
        // A stop token is counted, but was not sent.
        let unsent = usage.completion_tokens - self.usage.completion_tokens;
        self.metrics.generated(unsent);
        self.usage = usage;
        let tokens = if stopped.is_some() {
            reason = FinishReason::Stop;
            self.pending.release(text.len())
        } else {
            text.push_str(&self.stops.finish());
            self.pending.release_all()
        };
        self.tell(text, tokens);
        self.finish(reason, stopped.map(|stopped| stopped.index));
    }

    /// Whether the last token is one of those before which no answer stops.
    fn is_early(&self) -> bool {
        self.usage.completion_tokens <= self.min_tokens
    }

    fn tell(&mut self, text: String, tokens: Vec<Token>) {
        let usage = self.usage;
        self.ready.push_back(TextEvent::Text {
            text,
            tokens,
            usage,
        });
    }

    fn finish(&mut self, reason: FinishReason, stopped: Option<usize>) {
        let usage = self.usage;
        self.ready.push_back(TextEvent::Finished {
            reason,
            usage,
            stopped,
        });
        self.done = true;
        self.tokens = stream::empty().boxed(); // Frees the engine's blocks now.
        self.metrics.finished(reason, usage, &self.times);
        let first_token = self
            .times
            .first_token
            .map(|first| first - self.times.arrived);
        tracing::info!(
            parent: &self.span,
            finish_reason = reason.as_str(),
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            completion_tokens = usage.completion_tokens,
            first_token_seconds = first_token.map(|time| time.as_secs_f64()),
            seconds = self.times.since_arrival().as_secs_f64(),
            "completed"
        );
    }

    fn time_token(&mut self) {
        let now = Instant::now();
        match self.times.last_token.replace(now) {
            None => {
                self.times.first_token = Some(now);
                self.metrics.first_token(&self.times);
            }
            Some(last) => self.metrics.next_token(now - last),
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if !self.done {
            self.metrics.aborted();
            let (tokens, seconds) = (self.usage.completion_tokens, self.times.since_arrival());
            let seconds = seconds.as_secs_f64();
            tracing::info!(parent: &self.span, completion_tokens = tokens, seconds, "aborted");
        }
    }
}

/// Looks for a stop string that ends in this text, unless the text comes too early: then one may
/// only begin in it, as with vLLM.
fn look(stops: &mut StopMatcher, text: &str, is_early: bool) -> (String, Option<Stopped>) {
    match is_early {
        true => (stops.pass(text), None),
        false => stops.push(text),
    }
}

/// Waits until the time is up; forever if there is none.
async fn elapsed(timeout: &mut Option<Pin<Box<Sleep>>>) {
    match timeout {
        Some(sleep) => sleep.await,
        None => std::future::pending().await,
    }
}

/// Tokens whose text is not out yet.
#[derive(Debug, Default)]
struct Pending {
    /// Each with where its text starts.
    tokens: VecDeque<(usize, Token)>,
    decoded_bytes: usize,
    released_bytes: usize,
}

impl Pending {
    fn push(&mut self, token: Token, text_bytes: usize) {
        self.tokens.push_back((self.decoded_bytes, token));
        self.decoded_bytes += text_bytes;
    }

    /// The tokens that begin before the end of the text released so far.
    fn release(&mut self, text_bytes: usize) -> Vec<Token> {
        self.released_bytes += text_bytes;
        let held = self
            .tokens
            .partition_point(|(start, _)| *start < self.released_bytes);
        self.tokens.drain(..held).map(|(_, token)| token).collect()
    }

    fn release_all(&mut self) -> Vec<Token> {
        self.tokens.drain(..).map(|(_, token)| token).collect()
    }
}

/// A whole completion.
#[derive(Debug)]
pub(crate) struct Collected {
    pub(crate) prompt: Vec<Option<TokenLogprobs>>,
    pub(crate) embedding: Vec<f32>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<Token>,
    pub(crate) reason: FinishReason,
    pub(crate) usage: Usage,
}

/// Waits for the end of a completion.
pub(crate) async fn collect(mut events: TextStream) -> Result<Collected> {
    let mut whole = Collected {
        prompt: Vec::new(),
        embedding: Vec::new(),
        text: String::new(),
        tokens: Vec::new(),
        reason: FinishReason::Length,
        usage: Usage::default(),
    };
    while let Some(event) = events.try_next().await? {
        match event {
            TextEvent::Prompt(logprobs) => whole.prompt = logprobs,
            TextEvent::Embedding(state) => whole.embedding = state,
            TextEvent::Text { text, tokens, .. } => {
                whole.text.push_str(&text);
                whole.tokens.extend(tokens);
            }
            TextEvent::Finished { reason, usage, .. } => {
                whole.reason = reason;
                whole.usage = usage;
            }
        }
    }
    Ok(whole)
}

/// What happens to several completions of one request.
#[derive(Debug)]
pub(crate) enum ChoiceEvent {
    /// As [`TextEvent::Prompt`].
    Prompt {
        index: u32,
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// As [`TextEvent::Text`].
    Text {
        index: u32,
        text: String,
        tokens: Vec<Token>,
        usage: Usage,
    },
    /// One is done.
    Finished {
        index: u32,
        reason: FinishReason,
        usage: Usage,
    },
    /// All are done.
    AllFinished { usages: Vec<Usage> },
}

/// The events of several completions as they come. Waits for the first, so that an error before
/// it can still be an HTTP status.
pub(crate) async fn merge(
    choices: Vec<TextStream>,
) -> Result<impl Stream<Item = Result<ChoiceEvent>> + Send + 'static> {
    let usages = vec![Usage::default(); choices.len()];
    let numbered = (0..)
        .zip(choices)
        .map(|(index, choice)| choice.map_ok(move |event| (index, event)).boxed());
    let mut merged = Merged {
        events: stream::select_all(numbered),
        usages: Some(usages),
    };
    let first = merged.step().await?;
    let rest = stream::try_unfold(merged, |mut merged| async move {
        Ok(merged.step().await?.map(|event| (event, merged)))
    });
    Ok(stream::iter(first.map(Ok)).chain(rest))
}

struct Merged {
    events: SelectAll<BoxStream<'static, Result<(u32, TextEvent)>>>,
    /// `None` once they are told.
    usages: Option<Vec<Usage>>,
}

impl Merged {
    async fn step(&mut self) -> Result<Option<ChoiceEvent>> {
        let Some((index, event)) = self.events.try_next().await? else {
            return Ok(self
                .usages
                .take()
                .map(|usages| ChoiceEvent::AllFinished { usages }));
        };
        Ok(Some(match event {
            TextEvent::Prompt(logprobs) => ChoiceEvent::Prompt { index, logprobs },
            TextEvent::Embedding(_) => return Ok(None), // Nobody streams one.
            TextEvent::Text {
                text,
                tokens,
                usage,
            } => ChoiceEvent::Text {
                index,
                text,
                tokens,
                usage,
            },
            TextEvent::Finished { reason, usage, .. } => {
                if let Some(usages) = &mut self.usages {
                    usages[index as usize] = usage;
                }
                ChoiceEvent::Finished {
                    index,
                    reason,
                    usage,
                }
            }
        }))
    }
}
