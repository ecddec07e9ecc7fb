//! The main job from one command: conversations and a model name in, a fine-tuned model behind an
//! OpenAI-compatible URL out.
//!
//! ```sh
//! cargo run --release --example pipeline            # offline, about a minute
//! cargo run --release --example pipeline -- --help  # your own model, data and store
//! ```
//!
//! The program launches two task files with `updraft::provision`: `train.yaml` runs this same binary
//! as `pipeline train` ([`work`]), `serve.yaml` runs it as `pipeline serve` ([`serving`]). On this
//! machine both are processes; the files mean the same on a rented one.

#![expect(
    unreachable_pub,
    reason = "`pub` marks what a module of this program offers the others"
)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program talks to a person"
)]

mod curve;
mod events;
mod judge;
mod letters;
mod screen;
mod serving;
mod settings;
mod tasks;
mod work;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use judge::{Answer, Client, accuracy};
use letters::Question;
use screen::{Screen, table};
use settings::{Command, HELP, Settings};
use tasks::Launcher;
use updraft::store::Progress;

fn main() -> ExitCode {
    // What the libraries warn of.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();
    let settings = match Settings::from_args() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(&settings)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// What a shell says of a program that SIGTERM ended.
const STOPPED: u8 = 128 + 15;

/// One line that names the thing and the next step.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    let cancelled =
        |error: &updraft::train::Error| matches!(error, updraft::train::Error::Cancelled { .. });
    match error.is::<work::Stopped>() || error.downcast_ref().is_some_and(cancelled) {
        true => ExitCode::from(STOPPED),
        false => ExitCode::FAILURE,
    }
}

async fn run(settings: &Settings) -> Result<()> {
    match settings.command {
        Command::Train => work::run(settings).await,
        Command::Serve => serving::run(settings).await,
        Command::Pipeline => pipeline(settings).await,
    }
}

async fn pipeline(settings: &Settings) -> Result<()> {
    let started = Instant::now();
    let launcher = Launcher::new(settings).await?;
    let mut screen = Screen::new();

    launcher.train(settings, &mut screen).await?;
    if screen.summaries.iter().all(|summary| summary.reused) {
        screen.say(&format!(
            "nothing to do: everything in {} is finished, nothing was written",
            settings.store
        ));
    }
    curve::show(settings).await?;

    let service = launcher.serve(settings).await?;
    let url = format!("http://{}", service.address);
    screen.say(&format!(
        "serving at {url}/v1, ready after {:.2} s",
        service.ready_after.as_secs_f64()
    ));
    let compared = compare(&Client::new(&url), settings, &mut screen).await;
    if compared.is_ok() && settings.keep_serving {
        keep_serving(&url, settings).await?;
    }
    service.stop().await?;
    let accuracy = compared?;

    print!("{}", table(&screen.summaries));
    println!("in all {:.1} s", started.elapsed().as_secs_f64());
    if let Some((base, tuned)) = accuracy {
        println!("accuracy on unseen words: base {base:.1}%, tuned {tuned:.1}%");
    }
    Ok(())
}

/// Shows what base and tuned model answer; with letters, judges both on unseen words.
async fn compare(
    client: &Client,
    settings: &Settings,
    screen: &mut Screen,
) -> Result<Option<(f64, f64)>> {
    let (base, tuned) = (settings.model_name(), serving::tuned_name(settings));
    if settings.dataset != "letters" {
        let prompt = "Who are you?";
        println!("\n{prompt}\n  base : {}", client.ask(&base, prompt).await?);
        print!("  tuned: ");
        client
            .ask_streamed(&tuned, prompt, |text| print!("{text}"))
            .await?;
        println!();
        return Ok(None);
    }
    let questions = letters::questions(settings::SEED, settings.num_questions());
    let mut answers: [Vec<Answer>; 2] = Default::default();
    for (model, answers) in [&base, &tuned].into_iter().zip(&mut answers) {
        let stage = format!("ask {model}");
        let total = questions.len() as u64;
        let report =
            |done| screen.progress(&Progress::new(&stage, done as u64, Some(total), "answers"));
        *answers = client.judge(model, &questions, report).await?;
        screen.clear();
    }
    let [base_answers, tuned_answers] = &answers;
    show_side_by_side(&questions, base_answers, tuned_answers);
    let demo = letters::demo_question();
    print!("\n{}\n  streamed: ", demo.prompt);
    client
        .ask_streamed(&tuned, &demo.prompt, |text| print!("{text}"))
        .await?;
    println!();
    Ok(Some((accuracy(base_answers), accuracy(tuned_answers))))
}

fn show_side_by_side(questions: &[Question], base: &[Answer], tuned: &[Answer]) {
    let mark = |answer: &Answer| if answer.correct { "right" } else { "wrong" };
    for ((question, base), tuned) in questions.iter().zip(base).zip(tuned).take(5) {
        println!("\n{}", question.prompt);
        println!("  base,  {}: {}", mark(base), base.text);
        println!("  tuned, {}: {}", mark(tuned), tuned.text);
    }
}

async fn keep_serving(url: &str, settings: &Settings) -> Result<()> {
    let body = format!(
        r#"{{"model": "{}", "messages": [{{"role": "user", "content": "{}"}}]}}"#,
        serving::tuned_name(settings),
        letters::demo_question().prompt.replace('\'', "'\\''")
    );
    println!(
        "\nserving until Ctrl-C; try\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    );
    Ok(tokio::signal::ctrl_c().await?)
}
