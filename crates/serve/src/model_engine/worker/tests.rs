//! The thread step by step: cancelled, poisoned and started over.

use tokio::sync::{mpsc, oneshot};

use super::super::tests::{adapter_for_another_model, served_parts};
use super::*;

type Events = mpsc::UnboundedReceiver<Result<TokenEvent>>;

fn ask(inbox: &std::sync::mpsc::Sender<Arrival>, request: GenerateRequest) -> Events {
    ask_adapter(inbox, request, None)
}

fn ask_adapter(
    inbox: &std::sync::mpsc::Sender<Arrival>,
    request: GenerateRequest,
    adapter: Option<Generation>,
) -> Events {
    let (events, received) = mpsc::unbounded_channel();
    let (admitted, _) = oneshot::channel();
    let job = Job {
        request,
        adapter,
        grammar: None,
        events,
    };
    let jobs = vec![job];
    inbox.send(Arrival { jobs, admitted }).expect("it listens");
    received
}

fn greedy(prompt_tokens: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest::greedy("tiny", (0..prompt_tokens).collect(), max_tokens)
}

/// The tokens so far, and whether an error came.
fn told(events: &mut Events) -> (Vec<u32>, bool) {
    let (mut tokens, mut failed) = (Vec::new(), false);
    while let Ok(event) = events.try_recv() {
        match event {
            Ok(TokenEvent::Token { id, .. }) => tokens.push(id),
            Ok(_) => {}
            Err(_) => failed = true,
        }
    }
    (tokens, failed)
}

/// Not "soon": the first step after a client has gone has none of its tokens, and its blocks
/// are free, whether it was decoding, in the middle of its prompt, or still waiting.
#[test]
fn a_cancelled_request_is_gone_within_one_step() {
    let (mut worker, inbox) = served_parts();
    let clients = [5, 100, 5].map(|prompt_tokens| ask(&inbox, greedy(prompt_tokens, 50)));
    worker.turn(None);
    let progress = (
        worker.scheduler.num_running(),
        worker.scheduler.num_waiting(),
    );
    assert_eq!(
        progress,
        (2, 1),
        "one decodes, one has half its prompt, one waits"
    );
    drop(clients);
    worker.turn(None);
    let (free, all) = worker.scheduler.block_usage();
    assert_eq!((free, worker.sequences.len()), (all, 0));
    assert_eq!(worker.status.get().kv_cache_usage, 0.0);
}

/// One request of a batch fails or panics in the forward pass, at its start or later: it alone
/// gets an error, and the other's answer is what it would have been.
#[test]
fn a_poisoned_request_fails_alone() {
    let (mut worker, inbox) = served_parts();
    let mut events = ask(&inbox, greedy(9, 12));
    (0..12).for_each(|_| worker.turn(None));
    let expected = told(&mut events);
    assert_eq!((expected.0.len(), expected.1), (12, false));

    for (panics, after) in [(false, 0), (true, 0), (true, 3)] {
        let (mut worker, inbox) = served_parts();
        let mut good = ask(&inbox, greedy(9, 12));
        let poison = adapter_for_another_model().filter(|_| !panics);
        let mut bad = ask_adapter(&inbox, greedy(20, 12), poison);
        for turn in 0..40 {
            if panics && turn == after {
                // As if a length were counted wrong somewhere: an index out of bounds.
                let arrivals: Vec<Arrival> = worker.inbox.try_iter().collect();
                arrivals
                    .into_iter()
                    .for_each(|arrival| worker.admit(arrival));
                worker
                    .sequences
                    .get_mut(&1)
                    .expect("admitted")
                    .tokens
                    .clear();
            }
            worker.turn(None);
        }
        assert_eq!(told(&mut good), expected, "panics {panics} after {after}");
        let (tokens, failed) = told(&mut bad);
        assert!(failed && tokens.len() == after, "{tokens:?}");
        let (free, all) = worker.scheduler.block_usage();
        assert_eq!((free, worker.sequences.len()), (all, 0));
    }
}

/// What no request's own failure explains ends them all, and the next ones are served.
#[test]
fn the_engine_starts_over_when_nothing_else_helps() {
    let (mut worker, inbox) = served_parts();
    let mut lost = ask(&inbox, greedy(9, 12));
    worker.turn(None);
    // The scheduler's books are wrong: a block was freed under a running sequence.
    worker.scheduler.finish(0);
    worker
        .scheduler
        .admit(0, &[1, 2], 4, None)
        .expect("there is room");
    worker.start_over(&Failure {
        cause: "injected".into(),
        panicked: true,
    });
    assert!(told(&mut lost).1, "it is told");
    let mut next = ask(&inbox, greedy(9, 12));
    (0..12).for_each(|_| worker.turn(None));
    assert_eq!(told(&mut next).0.len(), 12);
}
