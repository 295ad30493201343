# For bash: `step NAME` begins a step; at the end, time by step, and which one failed. Removes the folder "$fresh".
names=() walls=() cpus=() name="" fresh=""

spent="$(mktemp)"

# Centiseconds that processes started here have had of the cores, in `cpu`; `times` in a subshell is the subshell's.
look_at_cpu() {
    times >"$spent"
    cpu="$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, part, /[ms]/); sum += part[1] * 60 + part[2] } print int(sum * 100) }' "$spent")"
}

end_step() {
    [ -n "$name" ] || return 0
    look_at_cpu
    names+=("$name") walls+=("$((SECONDS - began))") cpus+=("$(((cpu - used) / 100))")
}

step() {
    end_step
    look_at_cpu
    name="$1" began="$SECONDS" used="$cpu"
    printf '\n== %s (%s)\n' "$name" "$(date -u +%H:%M:%S)"
}

finish() {
    local status=$?
    end_step
    printf '\n== time by step\n%-44s %8s %8s\n' "" seconds "of CPU"
    for i in "${!names[@]}"; do printf '%-44s %8d %8d\n' "${names[i]}" "${walls[i]}" "${cpus[i]}"; done
    printf '%-44s %8d\n' total "$SECONDS"
    if [ $status = 0 ]; then echo "all passed"; else echo "failed: $name"; fi
    rm -rf "$spent" ${fresh:+"$fresh"}
}
trap finish EXIT
