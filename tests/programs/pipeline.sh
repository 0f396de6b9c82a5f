# A pipeline that numbers, changes and checks lines, beside background jobs.
status=$1
go=$status.go
say() { echo "$1" >"$status.new" && mv "$status.new" "$status"; }
fail() { say "failed: $1"; exit 1; }

declare -A table
for number in {1..500}; do table[key$number]=$((number * number)); done
signals=0
trap 'signals=$((signals + 1))' USR1

sleep 100000 &
sleeper=$!
(while [ ! -e "$go" ]; do sleep 0.01; done; exit 7) &
waiter=$!
# One that waits for the other end of a FIFO.
mkfifo "$status.fifo"
(read -r word <"$status.fifo"; [ "$word" = hello ] && exit 9) &
listener=$!

{
    number=0
    until [ -e "$go" ]; do
        number=$((number + 1))
        echo "line $number"
        [ $number -lt 50 ] || sleep 0.005
    done
    echo "end $number"
} | sed -u 's/^/piped: /' | {
    expected=0
    while read -r tag word number; do
        [ "$tag" = piped: ] || break
        if [ "$word" = end ]; then
            [ "$number" = "$expected" ] && echo "whole $number" >"$status.result"
            break
        fi
        expected=$((expected + 1))
        [ "$number" = "$expected" ] || break
        [ "$expected" != 50 ] || echo started >"$status.started"
    done
} &
pipeline=$!

while [ ! -e "$status.started" ]; do sleep 0.01; done
say ready
while [ ! -e "$go" ]; do sleep 0.01; done

wait $pipeline || fail "the pipeline ended with $?"
grep -q '^whole ' "$status.result" || fail "lines were lost"
wait $waiter
[ $? = 7 ] || fail "the waiting job ended otherwise"
echo hello >"$status.fifo"
wait $listener
[ $? = 9 ] || fail "the listening job ended otherwise"
kill -USR1 $$
[ $signals = 1 ] || fail "the trap ran $signals times"
[ "$(jobs -r | wc -l)" = 1 ] || fail "jobs: $(jobs)"
kill %1
wait $sleeper
[ $? = 143 ] || fail "the sleeping job ended otherwise"
for number in {1..500}; do
    [ "${table[key$number]}" = $((number * number)) ] || fail "table at $number"
done
say ok
