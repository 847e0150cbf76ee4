#!/usr/bin/env bash
# Set up .venv and make every table of results/ anew, by the commands of results/commands.txt.
#
#   WEB_NEWS=/path/to/web_news bash reproduce_results.sh [--list] [--keep] [NAME...]
#
# NAMEs are those of lines; without any, all lines are run. --list says what is done and what is left, and runs nothing.
# Data that cannot be downloaded are named by variables. A line whose data or programs are not there is skipped.
# JOBS is the number of processes, by default one a core. Each computes with one thread, so that the figures do not
# depend on JOBS.
#
# Stopped and called again it resumes. Prepared files, runs and logs lie in work/reproduced, which is of one state of the
# code: where the code has changed since, remove the folder, or keep what was made before with --keep.
set -uo pipefail
cd "$(dirname "$0")" || exit

list=no keep=no names=()
for word in "$@"; do
    case $word in
    --list) list=yes ;;
    --keep) keep=yes ;;
    -*) echo "usage: bash reproduce_results.sh [--list] [--keep] [NAME...]" >&2 && exit 2 ;;
    *) names+=("$word") ;;
    esac
done
folder=work/reproduced
export WEB_NEWS=${WEB_NEWS:-data/web_news} POSTERS=${POSTERS:-data/posters} ASP=${ASP:-data/asp}
export SENTENCES=${SENTENCES:-data/all-MiniLM-L6-v2}
export JOBS=${JOBS:-$(nproc)} OMP_NUM_THREADS=1 FEATURES=$folder/features

lines=()
while IFS= read -r line; do
    name=$(cut -d'|' -f1 <<<"$line" | xargs)
    if [ ${#names[@]} -eq 0 ] || printf '%s\n' "${names[@]}" | grep -qxF -e "$name"; then lines+=("$line"); fi
done < <(grep -v '^#' results/commands.txt | grep '|')
for name in ${names[@]+"${names[@]}"}; do
    if ! grep -qE "^$name *\|" results/commands.txt; then
        echo "results/commands.txt has no line $name" >&2 && exit 2
    fi
done

# Set name, needs, minutes and command to the fields of a line, and done_file to the note of its seconds.
read_line() {
    IFS='|' read -r name needs minutes command <<<"$1"
    name=$(xargs <<<"$name") needs=$(xargs <<<"$needs") minutes=$(xargs <<<"$minutes") command=${command# }
    done_file=$folder/$name.done
}

# What the line lacks, or nothing.
missing() {
    for need in $needs; do
        if [[ $need =~ ^[A-Z_]+$ ]]; then
            [ -d "${!need:-}" ] || echo "$need names no folder (${!need:-})"
        else
            command -v "$need" >/dev/null || echo "there is no $need"
        fi
    done
}

is_done() { [ -f "$done_file" ] && [ "$(tail -n +2 "$done_file")" = "$command" ]; }

# `3 of 6 done, about 40 min left`: estimates, times what those that are done took of theirs.
progress() {
    local all=0 finished=0 took=0 estimated=0 left=0
    for line in "${lines[@]}"; do
        read_line "$line"
        [ -z "$(missing)" ] || continue
        all=$((all + 1))
        if is_done; then
            finished=$((finished + 1)) took=$((took + $(head -n 1 "$done_file"))) estimated=$((estimated + 60 * minutes))
        else
            left=$((left + 60 * minutes))
        fi
    done
    if [ "$estimated" -gt 0 ]; then left=$((left * took / estimated)); fi
    echo "$finished of $all done$([ "$finished" -eq "$all" ] || echo ", about $(((left + 59) / 60)) min left")"
}

if [ $list = yes ]; then
    for line in "${lines[@]}"; do
        read_line "$line"
        if is_done; then state="done in $((($(head -n 1 "$done_file") + 59) / 60)) min"
        elif [ -n "$(missing)" ]; then state="skipped: $(missing | head -n 1)"
        else state="left, about $minutes min"; fi
        printf '%-20s %s\n' "$name" "$state"
    done
    progress
    exit
fi

. ./setup_environment.sh requirements.txt requirements-encoders.txt || exit
mkdir -p $folder
# Files of the product and their settings; documents and tests shape no figure.
code=$(find . -mindepth 1 \( -path './.*' -o -path ./work -o -path ./tests -o -path ./data \) -prune \
    -o \( -name '*.py' -o -name '*.yaml' \) -print | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum)
if [ $keep = no ] && [ -f $folder/code ] && [ "$(cat $folder/code)" != "$code" ]; then
    echo "the code has changed since $folder was begun: remove $folder to make all tables with one state of it, or" \
        "resume with --keep" >&2
    exit 2
fi
echo "$code" >$folder/code

failed=()
for line in "${lines[@]}"; do
    read_line "$line"
    if [ -n "$(missing)" ]; then
        echo "$name is skipped: $(missing | head -n 1)"
        continue
    fi
    if is_done; then
        echo "$name is done"
        continue
    fi
    echo "$name, about $minutes min; log: $folder/$name.log"
    started=$SECONDS before=$(cat "$done_file.before" 2>/dev/null || echo 0)
    WORK=$folder/$name bash -c "$command" >>"$folder/$name.log" 2>&1
    status=$?
    seconds=$((before + SECONDS - started))
    if [ $status -gt 128 ]; then
        echo $seconds >"$done_file.before"
        echo "stopped; the same command resumes" >&2
        exit $status
    elif [ $status -ne 0 ]; then
        echo "$name failed: $(tail -n 1 "$folder/$name.log")" >&2
        failed+=("$name")
        continue
    fi
    printf '%s\n%s' "$seconds" "$command" >"$done_file.part" && mv "$done_file.part" "$done_file"
    rm -f "$done_file.before"
    echo "$name is done; $(progress)"
done
if [ ${#failed[@]} -ne 0 ]; then
    echo "failed: ${failed[*]}; the same command tries them again" >&2
    exit 1
fi
progress
